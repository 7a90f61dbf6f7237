"""Placement of a model's parameters on a device mesh, by the rules of `lpo_jax.parallel.sharding`."""

from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lpo_jax.models import decoder
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.parameters import num_params, of_path
from lpo_jax.parallel.mesh import ModelSizes
from lpo_jax.parallel.sharding import current_mesh, spec
from lpo_jax.types import PyTree

T = TypeVar("T")


def model_sizes(config: ModelConfig) -> ModelSizes:
    """The sizes of a model that the choice of a mesh depends on."""
    return ModelSizes(config.num_heads, config.num_kv_heads, num_params(config))


def param_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh, tree: object = None) -> PyTree:
    """Return the shardings of a tree that contains parameters, such as a train state.

    A leaf is placed like the parameter that its path names, if it has the same shape, with or without the leading L.
    This includes gradients and optimizer moments. All other leaves are replicated.

    Args:
      config: the model's config.
      mesh: the mesh.
      tree: the tree, of arrays or abstract arrays; None: the parameters themselves.

    Returns:
      A tree of `NamedSharding`s of the same structure.
    """

    def place(path, leaf):
        if (parameter := of_path(path)) is not None:
            for stacked in (True, False):
                if leaf.shape == parameter.shape(config, stacked):
                    return NamedSharding(mesh, spec(mesh, parameter.logical_axes(stacked), leaf.shape))
        return NamedSharding(mesh, PartitionSpec())

    tree = decoder.abstract_params(config) if tree is None else tree
    return jax.tree_util.tree_map_with_path(place, tree)


def constrain_params(config: ModelConfig, tree: T) -> T:
    """Constrain the shardings of a tree to `param_shardings`. Identity without a mesh."""
    mesh = current_mesh()
    return (
        tree if mesh is None else jax.lax.with_sharding_constraint(tree, param_shardings(config, mesh, tree))
    )


def current_shardings(config: ModelConfig, tree: object = None) -> PyTree:
    """Return `param_shardings` for the current mesh; None without one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else param_shardings(config, mesh, tree)


def committed(tree: T) -> T:
    """Commit arrays to their device if there is no mesh, and copy those of NumPy to the first device.

    jax compiles a program once for committed arrays and once for others. Restored arrays are committed, and so is what
    is computed from them: with this, a resumed run has the programs of the first one.
    """
    if not jax.sharding.get_mesh().empty:
        return tree
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.device_put(tree, jax.tree.map(lambda x: getattr(x, "sharding", first), tree))


def placed(config: ModelConfig, abstract: T) -> T:
    """Add `param_shardings` to the abstract arrays of a tree; without a mesh, return it unchanged."""
    shardings = current_shardings(config, abstract)
    if shardings is None:
        return abstract
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
