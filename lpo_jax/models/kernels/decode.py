"""Attention of a few queries to a KV cache in which each row has its own length, on TPUs.

The plain twin is `attend_cached` in `lpo_jax.models.attention`. Decoding is limited by the bytes of keys and values, so
the kernel reads only the blocks between a row's first and last key, each once for all the queries that share it. One
call attends to the prompts and another to the rows' own tokens; `merge` combines the two.

Axes: B rows of the cache · C queries of each, I for each key/value head · G key/value heads · N head width · Y keys.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lpo_jax.models.kernels.devices import on_each_device

# Bytes of a block of keys. Reading a block takes long enough to hide the overhead of a grid step (a third of a
# microsecond). Two blocks of keys and two of values are in VMEM at a time, which is 16 MiB on every chip.
BLOCK_BYTES = 1 << 20
LANES, SUBLANES = 128, 16
LOWEST = jnp.finfo(jnp.float32).min


def attend_cached(q, k, v, start, stop, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Attend from query c of row b to the keys `start[b, c] <= y < stop[b]`.

    Args:
      q: `[B, G, C, I, N]`.
      k: `[B, G, N, Y]`.
      v: `[B, G, Y, N]`.
      start: `[B, C]` int32.
      stop: `[B]` int32. A query without keys gets zeros, and a normaliser that gives them no weight in `merge`.
      interpret: run in the interpreter, on any device but slowly.

    Returns:
      `[B, G, C, I, N]` in q's dtype and the log-sum-exp of the scaled scores, `[B, G, C, I]` float32.
    """
    attention = functools.partial(_attend_cached, interpret=interpret)
    return on_each_device(attention, ("batch", "kv_heads"), q, k, v, start, stop)


def block_size(num_keys: int, num_heads: int, head_width: int, itemsize: int) -> int:
    """Return the number of keys in a block: all, or as many multiples of `LANES` as fit into `BLOCK_BYTES`."""
    bytes_per_key = num_heads * math.ceil(head_width / SUBLANES) * SUBLANES * itemsize
    return min(num_keys, max(1, BLOCK_BYTES // bytes_per_key // LANES) * LANES)


def _attend_cached(q, k, v, start, stop, *, interpret):
    B, G, C, I, N = q.shape
    Y = k.shape[-1]
    block = block_size(Y, G, N, k.dtype.itemsize)
    first = jax.lax.div(jnp.maximum(start.min(axis=1), 0), block)  # [B]: the first and last block of each row
    last = jax.lax.div(jnp.maximum(stop - 1, 0), block)

    def rows(*shape):
        return pl.BlockSpec((None, *shape), lambda b, j, *_: (b,) + (0,) * len(shape))

    # After the last block of a row, the index stays the same, so that no further block is read.
    at = lambda b, j, first, last, _: jnp.minimum(first[b] + j, last[b])  # noqa: E731
    out, lse = pl.pallas_call(
        functools.partial(_kernel, block=block, num_keys=Y),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, pl.cdiv(Y, block)),
            in_specs=[
                rows(C * I, 1),
                rows(G, C * I, N),
                pl.BlockSpec((None, G, N, block), lambda b, j, *bounds: (b, 0, 0, at(b, j, *bounds))),
                pl.BlockSpec((None, G, block, N), lambda b, j, *bounds: (b, 0, at(b, j, *bounds), 0)),
            ],
            out_specs=[rows(G, C * I, N), rows(G, C * I, 1)],
            scratch_shapes=[pltpu.VMEM((G, C * I, size), jnp.float32) for size in (1, 1, N)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, G, C * I, N), q.dtype),
            jax.ShapeDtypeStruct((B, G, C * I, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="attend_cached",
    )(
        first,
        last,
        stop,
        jnp.repeat(start, I, axis=1)[..., None],
        (q * N**-0.5).reshape(B, G, C * I, N),
        k,
        v,
    )
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def _kernel(first, last, stop, start, q, k, v, out, lse, peak, total, weighted, *, block, num_keys):
    b, j = pl.program_id(0), pl.program_id(1)
    precision = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    product = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(j == 0)
    def _():
        peak[...] = jnp.full_like(peak, LOWEST)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(first[b] + j <= last[b])
    def _():
        key = (first[b] + j) * block + jax.lax.broadcasted_iota(jnp.int32, (q.shape[1], block), 1)
        seen = (key >= start[...]) & (key < stop[b])
        for g in range(k.shape[0]):
            scores = jnp.where(seen, product(q[g], k[g]), LOWEST)  # [C I, block]
            new_peak = jnp.maximum(peak[g], scores.max(-1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(scores - new_peak), 0.0)
            values = v[g]
            if num_keys % block:  # a block's content after the last key is undefined
                key = (first[b] + j) * block + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
                values = jnp.where(key < num_keys, values, 0)
            shrink = jnp.exp(peak[g] - new_peak)
            total[g] = shrink * total[g] + weights.sum(-1, keepdims=True)
            weighted[g] = shrink * weighted[g] + product(weights.astype(v.dtype), values)
            peak[g] = new_peak

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        safe = jnp.where(total[...] > 0, total[...], 1.0)
        out[...] = (weighted[...] / safe).astype(out.dtype)
        lse[...] = peak[...] + jnp.log(safe)
