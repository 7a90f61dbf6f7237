"""Sharding rules: one table maps the logical axes of arrays to the axes of the device mesh.

The mesh (`lpo_jax.parallel.mesh`) has three axes. `data` splits only the prompts. `fsdp` splits the prompts, the
parameters and the optimizer state; each layer's parameters are gathered when the layer runs. `tensor` splits heads,
feed-forward and vocabulary, so that several devices compute a layer together. Code names the logical axes of an array
(`constrain`), the table places them, and the compiler inserts the communication. Without a mesh, all functions here
are identities.

Decoding reads every weight for each token, so no weight may be gathered there. `decode_mesh` arranges the same devices
without `fsdp`; by the same table, weights are then whole on every device or split over `tensor` alone.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes, outermost first. An axis that is not listed is not split.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows of activations: prompts, or packed rows of groups
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # the model width of a weight; that of activations is not split and not named
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
}


def current_mesh() -> AbstractMesh | None:
    """Return the mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def batch_shards() -> int:
    """Return the number of shards of the batch axis: 1 without a mesh. Inside `shard_map`, those within this shard."""
    return _size(current_mesh(), RULES["batch"])


def spec(mesh: Mesh | AbstractMesh, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """Return the partition spec of an array with these logical axes. Axes that do not divide evenly are not split."""
    entries = []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(a for a in RULES.get(name, ()) if _size(mesh, (a,)) > 1)
        entries.append(axes if axes and size % _size(mesh, axes) == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the sharding of `x` to the table's for these logical axes. None: not split. Identity without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, names, x.shape))


def gathered(weight: jax.Array, dtype: DTypeLike, *names: str | None) -> jax.Array:
    """Cast a weight to `dtype` and gather its `embed` axis, before a product or a look-up.

    Without this constraint, the compiler may move activations to the shards of the weight instead. The weight is cast
    first, so that a bfloat16 product gathers half the bytes. Without a mesh, the weight is returned as it is.
    """
    if current_mesh() is None:
        return weight
    return constrain(weight.astype(dtype), *(None if name == "embed" else name for name in names))


def summed(function: Callable, axes: tuple[str, ...], dim: int) -> Callable:
    """Transform `function(weights, batch) -> (total, outputs)` to run on each shard of the batch and sum totals once.

    If the compiler partitions a loop that accumulates gradients, it sums over the devices in every iteration. Here each
    shard runs the loop on its own rows, and the devices communicate once, after the loop.

    Args:
      function: the function; it must be linear in the batch, in the sense that totals of shards can be added.
      axes: the mesh axes that the batch is split along. Axes that an enclosing `shard_map` has taken are ignored.
      dim: the batch axis of the arrays in `batch` and `outputs`.
    """
    axes = _free(axes)
    if not axes:
        return function
    weights, batch = PartitionSpec(), PartitionSpec(*[None] * dim, axes)

    def shard(*arguments):
        total, outputs = function(*arguments)
        return jax.lax.psum(total, axes), outputs

    specs = {"in_specs": (weights, batch), "out_specs": (weights, batch)}
    return jax.shard_map(shard, axis_names=set(axes), check_vma=False, **specs)  # type: ignore[call-overload]


def look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """Return `table[index]` for an index whose first axis is the batch; each shard looks up its own rows.

    Without this, the compiler gathers all rows of the batch to compute the gradient of the table.
    """
    axes = _free(RULES["batch"])
    if not axes or index.shape[0] % batch_shards():
        return table[index]
    split = PartitionSpec(axes)
    specs = {"in_specs": (PartitionSpec(), split), "out_specs": split}
    return jax.shard_map(lambda t, i: t[i], axis_names=set(axes), check_vma=False, **specs)(table, index)  # type: ignore[call-overload]


def on_each_shard(function: Callable[..., T], *arrays: object) -> T:
    """Apply `function` to each shard of the batch, the first axis of all arrays, by itself.

    Indices into the batch are therefore relative to the shard, and no data moves between devices. Without a mesh,
    `function` is applied to the whole arrays.
    """
    axes = _free(RULES["batch"])
    if not axes:
        return function(*arrays)
    specs = {"in_specs": PartitionSpec(axes), "out_specs": PartitionSpec(axes)}
    return jax.shard_map(function, axis_names=set(axes), check_vma=False, **specs)(*arrays)  # type: ignore[call-overload]


def whole(tree: T) -> T:
    """Replicate every array of a tree on all devices, so that any host can read it. Use it for small arrays."""
    if current_mesh() is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """Return a context manager that sets the mesh; None leaves the current one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def decode_mesh(mesh: Mesh, tensor: int = 1) -> Mesh:
    """Return the mesh for sampling: the same devices in the same order, without `fsdp`.

    Args:
      mesh: the mesh for training.
      tensor: the number of devices that every weight is split over: 1 if the weights fit on one device, else a divisor
        of the number of devices.
    """
    return Mesh(np.reshape(mesh.devices, (-1, 1, tensor)), mesh.axis_names, axis_types=mesh.axis_types)


def _free(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes that have more than one device and that no enclosing `shard_map` has taken."""
    mesh = current_mesh()
    return tuple(axis for axis in axes if _size(mesh, (axis,)) > 1)


def _size(mesh: Mesh | AbstractMesh | None, axes: tuple[str, ...]) -> int:
    """The number of devices along some axes; an axis taken by an enclosing `shard_map` counts as one."""
    if mesh is None:
        return 1
    manual = getattr(mesh, "manual_axes", ())
    return math.prod(mesh.shape[a] for a in axes if a not in manual)
