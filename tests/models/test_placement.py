"""Placement of parameters on a mesh of eight fake devices, and of arrays without one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec

from lpo_jax.models import decoder, parameters
from lpo_jax.models.placement import committed, param_shardings
from lpo_jax.parallel import sharding
from lpo_jax.parallel.sharding import AXES, decode_mesh


def mesh_of(*shape):
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def test_parameters_are_split_where_they_divide(tiny_config):
    placed = param_shardings(tiny_config, mesh_of(2, 2, 2))
    shapes = decoder.abstract_params(tiny_config)
    assert jax.tree.structure(placed) == jax.tree.structure(shapes)
    local = jax.tree.map(lambda s, x: s.shard_shape(x.shape), placed, shapes)
    assert shapes["layers"]["wq"].shape == (2, 32, 4, 8) and local["layers"]["wq"] == (2, 16, 2, 8)
    assert local["layers"]["wk"] == (2, 16, 1, 8) and local["layers"]["w_down"] == (2, 24, 16)
    assert tiny_config.vocab_size % 2 and local["embed"] == (tiny_config.vocab_size, 16)
    assert local["layers"]["q_norm"] == (2, 8)


def test_an_optimizer_lies_as_its_parameters(tiny_config):
    mesh, shapes = mesh_of(2, 2, 2), decoder.abstract_params(tiny_config)
    moments = jax.eval_shape(optax.adam(1e-3).init, shapes)[0]
    placed = param_shardings(tiny_config, mesh, moments)
    of_params = param_shardings(tiny_config, mesh)
    assert placed.mu == of_params and placed.nu == of_params and placed.count.is_fully_replicated
    unstacked = {
        **shapes,
        "layers": {0: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes["layers"])},
    }
    one_layer = param_shardings(tiny_config, mesh, unstacked)["layers"][0]["wq"]
    assert one_layer.spec == PartitionSpec(("fsdp",), ("tensor",), None)


def test_decoding_gathers_nothing(tiny_config):
    mesh = mesh_of(2, 2, 2)
    whole, split = decode_mesh(mesh), decode_mesh(mesh, tensor=2)
    assert dict(whole.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(split.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert list(split.devices.flat) == list(mesh.devices.flat)
    shapes = decoder.abstract_params(tiny_config)
    for placed in jax.tree.leaves(param_shardings(tiny_config, whole)):
        assert placed.is_fully_replicated
    assert param_shardings(tiny_config, split)["layers"]["wo"].shard_shape(shapes["layers"]["wo"].shape) == (
        2,
        2,
        8,
        32,
    )


def test_every_logical_axis_of_a_parameter_is_known(tiny_config):
    """With a misspelt name, an axis would silently not be split."""
    whole = {"layers", "head_width"}
    axes = {axis for parameter in parameters.declared(tiny_config) for axis in parameter.logical_axes()}
    assert axes <= sharding.RULES.keys() | whole


def test_committed_arrays_stay_on_their_device_and_are_not_copied():
    with jax.default_device(jax.devices()[1]):
        free = jnp.ones(3)
    on_device, of_numpy = committed([free, np.ones(2)])
    assert not free.committed and on_device.committed and of_numpy.committed
    assert on_device.unsafe_buffer_pointer() == free.unsafe_buffer_pointer()
    assert on_device.devices() == {jax.devices()[1]} and of_numpy.devices() == {jax.devices()[0]}
