"""Where the parameters of a model lie on a device mesh, by the rules of `lpo_jax.parallel.sharding`."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lpo_jax.models import decoder
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.parameters import num_params, of_path
from lpo_jax.parallel.mesh import ModelSizes
from lpo_jax.parallel.sharding import current_mesh, spec


def model_sizes(config: ModelConfig) -> ModelSizes:
    """The sizes of a model that the choice of a mesh depends on."""
    return ModelSizes(config.num_heads, config.num_kv_heads, num_params(config))


def param_shardings(config: ModelConfig, mesh: Mesh, tree: Any = None) -> Any:
    """The shardings of a tree that holds parameters, such as a train state; None: the parameters themselves.

    A leaf lies as the parameter that its path names and whose shape it has, with the layers' leading axis or
    without: so do gradients and the optimizer's moments. All others are whole on every device.
    """

    def place(path, leaf):
        if (parameter := of_path(path)) is not None:
            for stacked in (True, False):
                if leaf.shape == parameter.shape(config, stacked):
                    return NamedSharding(mesh, spec(mesh, parameter.logical_axes(stacked), leaf.shape))
        return NamedSharding(mesh, PartitionSpec())

    tree = decoder.abstract_params(config) if tree is None else tree
    return jax.tree_util.tree_map_with_path(place, tree)


def constrain_params(config: ModelConfig, tree: Any) -> Any:
    """A tree that holds parameters, laid out as `param_shardings` says. Identity without a mesh."""
    mesh = current_mesh()
    return (
        tree if mesh is None else jax.lax.with_sharding_constraint(tree, param_shardings(config, mesh, tree))
    )


def current_shardings(config: ModelConfig, tree: Any = None) -> Any:
    """`param_shardings` on the mesh around this code; None without one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else param_shardings(config, mesh, tree)


def placed(config: ModelConfig, abstract: Any) -> Any:
    """Abstract arrays of a tree that holds parameters, with their shardings; without a mesh as they are."""
    shardings = current_shardings(config, abstract)
    if shardings is None:
        return abstract
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
