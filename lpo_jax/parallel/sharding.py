"""Which axis of an array lies along which axis of the device mesh: one table for everything.

The mesh (`lpo_jax.parallel.mesh`) has three axes. `data` splits the prompts and nothing else. `fsdp` splits the
prompts too, and the parameters with their optimizer state, of which each layer is gathered when it runs.
`tensor` splits heads, feed-forward and vocabulary, so that a layer is computed by several devices together.
Arrays carry no shardings of their own: the code names axes (`constrain`), the table places them, and the
compiler puts in the communication. Without a mesh all of this does nothing.

Decoding reads every weight for each token, so nothing may be gathered there: `decode_mesh` lays the same
devices out without `fsdp`, and the same table then keeps weights whole, or split over `tensor` alone.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes, outermost first. An axis that is not here is whole on every device.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows of activations: prompts, or packed rows of whole groups
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # D of a weight; activations keep D whole and leave it unnamed
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
}


def current_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` around this code; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def batch_shards() -> int:
    """How many parts the prompts of a batch lie in: 1 without a mesh. Under `shard_map`, of this shard's own."""
    return _size(current_mesh(), RULES["batch"])


def spec(mesh: Mesh | AbstractMesh, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """Where the axes `names` of an array of this shape lie. An axis that does not divide evenly stays whole."""
    entries = []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(a for a in RULES.get(name, ()) if _size(mesh, (a,)) > 1)
        entries.append(axes if axes and size % _size(mesh, axes) == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out as the table says of its axes' logical names; None: whole. Identity without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, names, x.shape))


def gathered(weight: jax.Array, dtype: Any, *names: str | None) -> jax.Array:
    """A weight as products and look-ups want it: in `dtype`, and no longer split along `embed`.

    Left to itself the compiler may move activations to the parts of the weight instead. Cast first, so that half
    the bytes travel. Without a mesh: the weight as it is.
    """
    if current_mesh() is None:
        return weight
    return constrain(weight.astype(dtype), *(None if name == "embed" else name for name in names))


def summed(function: Callable, axes: tuple[str, ...], dim: int) -> Callable:
    """`function(weights, batch) -> (total, outputs)` on each shard of a batch by itself, totals added once.

    Where the compiler splits a loop that adds up gradients, it adds up over the devices in every turn. Here each
    shard runs the loop on its own rows, and the devices speak once, at the end.

    Args:
      axes: of the mesh, that the batch is split along; those that are taken already are left as they are.
      dim: of the batch axis in the arrays of `batch` and `outputs`.
    """
    axes = _free(axes)
    if not axes:
        return function
    weights, batch = PartitionSpec(), PartitionSpec(*[None] * dim, axes)

    def shard(*arguments):
        total, outputs = function(*arguments)
        return jax.lax.psum(total, axes), outputs

    specs = {"in_specs": (weights, batch), "out_specs": (weights, batch)}
    return jax.shard_map(shard, axis_names=set(axes), check_vma=False, **specs)


def look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]`, of an index whose first axis is a batch's; each shard looks up its own.

    Left to itself the compiler gathers all rows of the batch to make the table's gradient.
    """
    axes = _free(RULES["batch"])
    if not axes or index.shape[0] % batch_shards():
        return table[index]
    split = PartitionSpec(axes)
    specs = {"in_specs": (PartitionSpec(), split), "out_specs": split}
    return jax.shard_map(lambda t, i: t[i], axis_names=set(axes), check_vma=False, **specs)(table, index)


def on_each_shard(function: Callable, *arrays: Any) -> Any:
    """`function(*arrays)`, of trees of arrays whose first axes are a batch's: each shard by itself, with its own part.

    So indices into a batch are a shard's own, and nothing moves from device to device. Without a mesh: of the whole.
    """
    axes = _free(RULES["batch"])
    if not axes:
        return function(*arrays)
    specs = {"in_specs": PartitionSpec(axes), "out_specs": PartitionSpec(axes)}
    return jax.shard_map(function, axis_names=set(axes), check_vma=False, **specs)(*arrays)


def whole(tree: Any) -> Any:
    """Every array of a tree whole on every device, where any host can read it; for small ones."""
    if current_mesh() is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def using(mesh: Mesh | None) -> Any:
    """`jax.set_mesh(mesh)` for the length of a `with`; None: as it is."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def decode_mesh(mesh: Mesh, tensor: int = 1) -> Mesh:
    """The same devices in the same order with every weight split over `tensor` of them, and no `fsdp`.

    Args:
      tensor: 1 where the weights fit on one device, else a divisor of the number of devices.
    """
    return Mesh(np.reshape(mesh.devices, (-1, 1, tensor)), mesh.axis_names, axis_types=mesh.axis_types)


def _free(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of more than one device that are the compiler's to split."""
    mesh = current_mesh()
    return tuple(axis for axis in axes if _size(mesh, (axis,)) > 1)


def _size(mesh: Mesh | AbstractMesh | None, axes: tuple[str, ...]) -> int:
    """Devices along some axes; an axis that `shard_map` has taken over counts once."""
    if mesh is None:
        return 1
    manual = getattr(mesh, "manual_axes", ())
    return math.prod(mesh.shape[a] for a in axes if a not in manual)
