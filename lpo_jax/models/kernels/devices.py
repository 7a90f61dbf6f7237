"""Kernels on a mesh: the compiler cannot split one, so each device is handed its own rows and heads."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from lpo_jax.parallel.sharding import current_mesh, spec


def on_each_device(attention: Callable, axes: tuple[str | None, ...], q, k, v, *rows: jax.Array):
    """`attention(q, k, v, *rows)`, on the current mesh with each device's part of the rows and of the heads.

    Args:
      axes: logical names of the leading axes of q, k, v and of what is returned. k's sizes decide whether an axis is
        split, so that query heads follow their key/value heads.
      rows: arrays whose first axis is that of q.
    """
    mesh = current_mesh()
    if mesh is None:
        return attention(q, k, v, *rows)
    split = spec(mesh, axes, k.shape[: len(axes)])
    specs = (split, split, split) + (PartitionSpec(split[0]),) * len(rows)
    return jax.shard_map(attention, in_specs=specs, out_specs=split, check_vma=False)(q, k, v, *rows)
