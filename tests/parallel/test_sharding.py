"""The sharding rules on eight fake devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lpo_jax.parallel.sharding import (
    AXES,
    batch_shards,
    constrain,
    on_each_shard,
)


def mesh_of(*shape):
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((4, 2))
    assert constrain(x, "batch", None) is x
    assert batch_shards() == 1


def test_each_shard_counts_for_itself():
    x, last = np.arange(8.0), np.array([1, 0, 1, 1])
    take = jax.jit(lambda x, i: on_each_shard(lambda x, i: x[i], x, i))
    np.testing.assert_array_equal(take(x, last), [1, 0, 1, 1])
    with jax.set_mesh(mesh_of(2, 2, 2)):
        np.testing.assert_array_equal(take(x, last), [1, 2, 5, 7])


@pytest.mark.parametrize("shape, shards", [((8, 1, 1), 8), ((2, 2, 2), 4), ((1, 1, 8), 1)])
def test_a_batch_lies_along_data_and_fsdp(shape, shards):
    with jax.set_mesh(mesh_of(*shape)):
        assert batch_shards() == shards
        x = jax.jit(lambda x: constrain(2 * x, "batch", None))(np.ones((8, 3), np.float32))
    assert x.sharding.shard_shape(x.shape) == (8 // shards, 3)
    np.testing.assert_array_equal(x, 2)


def test_under_shard_map_only_the_other_axes_are_left():
    seen = []

    def shard(x):
        seen.append(batch_shards())
        return constrain(2 * x, "batch")

    with jax.set_mesh(mesh_of(2, 2, 2)):
        split = PartitionSpec("data")
        mapped = jax.shard_map(shard, axis_names={"data"}, in_specs=split, out_specs=split)
        np.testing.assert_array_equal(jax.jit(mapped)(np.ones(8, np.float32)), 2)
    assert seen == [2]
