"""Kernels on a mesh: the compiler cannot partition a kernel, so each device runs it on its own rows and heads."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from lpo_jax.parallel.sharding import current_mesh, spec


def on_each_device(attention: Callable, axes: tuple[str | None, ...], q, k, v, *rows: jax.Array):
    """Run `attention(q, k, v, *rows)` on each device's part of the rows and heads on the current mesh.

    Args:
      attention: the kernel's function.
      axes: logical names of the leading axes of q, k, v and of the results. The sizes of k decide whether an axis is
        split, so that query heads stay with their key/value heads.
      rows: arrays with the same first axis as q.
    """
    mesh = current_mesh()
    if mesh is None:
        return attention(q, k, v, *rows)
    split = spec(mesh, axes, k.shape[: len(axes)])
    specs = (split, split, split) + (PartitionSpec(split[0]),) * len(rows)
    return jax.shard_map(attention, in_specs=specs, out_specs=split, check_vma=False)(q, k, v, *rows)
