"""Attention of a few queries to stored keys and values of which each row has its own real length, on TPUs.

The plain twin is `attend_stored` in `lpo_jax.models.attention`. Decoding is bound by the bytes of keys and values: the
kernel reads the blocks between a row's first and last key and no others, each once for all the queries that share
it. One call serves the rows of a prompt, another each row's own keys; `merge` joins the two.

Axes: B rows of storage · C queries of each, I for each key/value head · G key/value heads · N head width · Y keys.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lpo_jax.models.kernels.devices import on_each_device

# Bytes of a block of keys: a read long enough to hide what a step of the grid costs beside it (a third of a
# microsecond). Two such blocks of keys and two of values are in VMEM at a time, of 16 MiB on every chip.
BLOCK_BYTES = 1 << 20
LANES, SUBLANES = 128, 16
LOWEST = jnp.finfo(jnp.float32).min


def attend_stored(q, k, v, start, stop, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Query c of row b attends to the keys `start[b, c] <= y < stop[b]`.

    Args:
      q: `[B, G, C, I, N]`; k: `[B, G, N, Y]`; v: `[B, G, Y, N]`.
      start: `[B, C]`, stop: `[B]`, int32. A query without keys gets zeros, and a normaliser that gives them no weight.
      interpret: run on any device, slowly.

    Returns:
      `[B, G, C, I, N]` in q's dtype and the log-sum-exp of the scaled scores, `[B, G, C, I]` float32.
    """
    attention = functools.partial(_attend_stored, interpret=interpret)
    return on_each_device(attention, ("batch", "kv_heads"), q, k, v, start, stop)


def block_size(num_keys: int, num_heads: int, head_width: int, itemsize: int) -> int:
    """Keys in a block: all, or as many whole lanes as fit `BLOCK_BYTES`."""
    bytes_per_key = num_heads * math.ceil(head_width / SUBLANES) * SUBLANES * itemsize
    return min(num_keys, max(1, BLOCK_BYTES // bytes_per_key // LANES) * LANES)


def _attend_stored(q, k, v, start, stop, *, interpret):
    B, G, C, I, N = q.shape
    Y = k.shape[-1]
    block = block_size(Y, G, N, k.dtype.itemsize)
    first = jax.lax.div(jnp.maximum(start.min(axis=1), 0), block)  # [B]: a row's first block and its last
    last = jax.lax.div(jnp.maximum(stop - 1, 0), block)

    def rows(*shape):
        return pl.BlockSpec((None, *shape), lambda b, j, *_: (b,) + (0,) * len(shape))

    # Behind the last block of a row the last one is asked for again, and so not read again.
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
        name="attend_stored",
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
            if num_keys % block:  # what a block holds behind the last key may be anything
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
