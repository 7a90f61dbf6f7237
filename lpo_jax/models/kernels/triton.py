"""Attention to one source by Pallas kernels for the Triton compiler, for `lpo_jax.models.kernels.union`.

They take what cuDNN does not: float32, sliding windows, rows that begin with padding, heads of any width. The kernels
that come with JAX (`pallas.ops.gpu.attention`) have neither grouped heads nor a length of the keys, and their backward
pass needs as many queries as keys. The algorithm is that of FlashAttention-2 (arXiv 2307.08691): scores exist in blocks
only, the backward pass recomputes them from the log-sum-exp, and blocks that no query attends to are skipped. Each
program of the grid writes its own part of a result, so that sums have one order and results are reproducible.

Axes: B rows · X queries, Y keys of a source · H query heads · G key/value heads, I = H / G query heads of each ·
N head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lpo_jax.models.kernels.union import Kernel, KeySource

# Queries and keys of a block, of heads up to 512 and 256 bytes; with wider heads they are fewer, so that all blocks of
# a program fit into the shared memory of a multiprocessor of Ampere, 163 KiB. The compiler refuses what does not fit.
QUERIES, KEYS = 64, 64
NARROWEST = 16  # a dimension of a product
LOWEST = jnp.finfo(jnp.float32).min  # the score of a masked key


@functools.cache
def kernel(interpret: bool = False) -> Kernel:
    """Return the kernel; `interpret`: run in the interpreter, on any device but slowly."""
    return Kernel(
        functools.partial(_forward, interpret=interpret), functools.partial(_backward, interpret=interpret)
    )


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The matrix product of two blocks, accumulated in float32, and exact for float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def power_of_two(size: int) -> int:
    """The power of two from 16 that holds `size`: Triton has no other dimensions."""
    return max(NARROWEST, pl.next_power_of_2(size))


def pad(x: jax.Array, sizes: dict[int, int]) -> jax.Array:
    """Pad axes of `x` with zeros to the given sizes."""
    return jnp.pad(x, [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)])


def _blocks(X: int, Y: int, head_bytes: int) -> tuple[int, int, int, int]:
    """Queries and keys of a block, and of all blocks together."""
    queries = min(QUERIES * 512 // max(head_bytes, 512), power_of_two(X))
    keys = min(KEYS * 256 // max(head_bytes, 256), power_of_two(Y))
    return queries, keys, pl.cdiv(X, queries) * queries, pl.cdiv(Y, keys) * keys


def _parameters(warps: int) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=warps, num_stages=2)


def _forward(q: jax.Array, source: KeySource, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    (B, X, H, N), (Y, G) = q.shape, source.k.shape[1:3]
    width, I = power_of_two(N), H // G
    queries, keys, all_queries, all_keys = _blocks(X, Y, width * q.dtype.itemsize)
    of_queries = pl.BlockSpec((None, queries, None, width), lambda x, h, b: (b, x, h, 0))
    of_keys = pl.BlockSpec((None, all_keys, None, width), lambda x, h, b: (b, 0, jax.lax.div(h, I), 0))
    bounds = pl.BlockSpec((None, queries), lambda x, h, b: (b, x))
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, scale=N**-0.5, keys=keys),
        grid=(all_queries // queries, H, B),
        in_specs=[of_queries, of_keys, of_keys, bounds, bounds],
        out_specs=[of_queries, pl.BlockSpec((None, None, queries), lambda x, h, b: (b, h, x))],
        out_shape=[
            jax.ShapeDtypeStruct((B, all_queries, H, width), q.dtype),
            jax.ShapeDtypeStruct((B, H, all_queries), jnp.float32),
        ],
        compiler_params=_parameters(4),
        interpret=interpret,
        name="attention",
    )(
        pad(q, {1: all_queries, 3: width}),
        *(pad(x, {1: all_keys, 3: width}) for x in (source.k, source.v)),
        *(pad(x, {1: all_queries}) for x in (source.first, source.stop)),
    )
    return out[:, :X, :, :N], jnp.swapaxes(lse, 1, 2)[:, :X]


def key_blocks(first: jax.Array, stop: jax.Array, keys: int) -> tuple[jax.Array, jax.Array]:
    """The first block of keys that some query attends to, and the one behind the last, for bounds of queries."""
    some = first < stop
    low = jnp.min(jnp.where(some, first, jnp.iinfo(jnp.int32).max))
    high = jnp.max(jnp.where(some, stop, 0))
    return jax.lax.div(low, jnp.int32(keys)), jax.lax.div(high + (keys - 1), jnp.int32(keys))


def scores_of(q, k, first, stop, start, scale):
    """Scaled scores of a block and which of them count: keys from index `start` on, keys on the last axis of k."""
    key = start + jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], k.shape[1]), 1)
    seen = (first[:, None] <= key) & (key < stop[:, None])
    return jnp.where(seen, product(q, k) * scale, LOWEST), seen


def add_block(carry, scores, seen, v):
    """Add a block of keys to the softmax so far, `(weighted [X, N], peak [X], total [X])`, with values `[Y, N]`."""
    weighted, peak, total = carry
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
    weights = jnp.where(seen, jnp.exp(scores - new_peak[:, None]), 0.0)
    shrink = jnp.exp(peak - new_peak)
    weighted = shrink[:, None] * weighted + product(weights.astype(v.dtype), v)
    return weighted, new_peak, shrink * total + jnp.sum(weights, axis=1)


def empty_softmax(X: int, N: int):
    """The softmax of no keys, for `add_block`."""
    return jnp.zeros((X, N), jnp.float32), jnp.full(X, LOWEST), jnp.zeros(X, jnp.float32)


def finish(carry):
    """Output and log-sum-exp of a softmax: zeros, and the lowest number, without keys."""
    weighted, peak, total = carry
    safe = jnp.where(total > 0, total, 1.0)
    return weighted / safe[:, None], peak + jnp.log(safe)


def _forward_kernel(q_ref, k_ref, v_ref, first_ref, stop_ref, out_ref, lse_ref, *, scale, keys):
    q, first, stop = q_ref[...], first_ref[...], stop_ref[...]

    def block(j, carry):
        at = pl.ds(j * keys, keys)
        return add_block(carry, *scores_of(q, k_ref[at, :].T, first, stop, j * keys, scale), v_ref[at, :])

    softmax = jax.lax.fori_loop(*key_blocks(first, stop, keys), block, empty_softmax(*q.shape))
    out, lse_ref[...] = finish(softmax)
    out_ref[...] = out.astype(out_ref.dtype)


def _backward(q, source: KeySource, out, lse, d_out, *, interpret: bool):
    (B, X, H, N), (Y, G) = q.shape, source.k.shape[1:3]
    width, I = power_of_two(N), H // G
    queries, keys, all_queries, all_keys = _blocks(X, Y, width * q.dtype.itemsize)
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    q_and_cotangent = [pad(x.astype(q.dtype), {1: all_queries, 3: width}) for x in (q, d_out)]
    k_and_v = [pad(x, {1: all_keys, 3: width}) for x in (source.k, source.v)]
    bounds = [pad(x, {1: all_queries}) for x in (source.first, source.stop)]
    lse_and_mean = [pad(jnp.swapaxes(x, 1, 2), {2: all_queries}) for x in (lse, mean)]
    arrays = *q_and_cotangent, *k_and_v, *bounds, *lse_and_mean

    of_queries = pl.BlockSpec((None, queries, None, width), lambda x, h, b: (b, x, h, 0))
    of_keys = pl.BlockSpec((None, all_keys, None, width), lambda x, h, b: (b, 0, jax.lax.div(h, I), 0))
    bound = pl.BlockSpec((None, queries), lambda x, h, b: (b, x))
    number = pl.BlockSpec((None, None, queries), lambda x, h, b: (b, h, x))
    d_q = pl.pallas_call(
        functools.partial(_query_kernel, scale=N**-0.5, keys=keys),
        grid=(all_queries // queries, H, B),
        in_specs=[of_queries] * 2 + [of_keys] * 2 + [bound] * 2 + [number] * 2,
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct((B, all_queries, H, width), q.dtype),
        compiler_params=_parameters(8),
        interpret=interpret,
        name="attention_gradient_of_queries",
    )(*arrays)

    of_queries = pl.BlockSpec((None, all_queries, I, width), lambda y, g, b: (b, 0, g, 0))
    of_keys = pl.BlockSpec((None, keys, None, width), lambda y, g, b: (b, y, g, 0))
    bound = pl.BlockSpec((None, all_queries), lambda y, g, b: (b, 0))
    number = pl.BlockSpec((None, I, all_queries), lambda y, g, b: (b, g, 0))
    edge = pl.BlockSpec((None, None), lambda y, g, b: (b, y))
    edges = _query_blocks(bounds[0], bounds[1], queries, keys, all_keys)
    d_k, d_v = pl.pallas_call(
        functools.partial(_key_kernel, scale=N**-0.5, queries=queries),
        grid=(all_keys // keys, G, B),
        in_specs=[of_queries] * 2 + [of_keys] * 2 + [bound] * 2 + [number] * 2 + [edge] * 2,
        out_specs=[of_keys] * 2,
        out_shape=[jax.ShapeDtypeStruct((B, all_keys, G, width), x.dtype) for x in (source.k, source.v)],
        compiler_params=_parameters(8),
        interpret=interpret,
        name="attention_gradient_of_keys",
    )(*arrays, *edges)
    return d_q[:, :X, :, :N], d_k[:, :Y, :, :N], d_v[:, :Y, :, :N]


def _query_blocks(first, stop, queries: int, keys: int, all_keys: int) -> tuple[jax.Array, jax.Array]:
    """The first block of queries that attends to each block of keys, and the one behind the last: `[B, blocks]`."""
    start = jnp.arange(0, all_keys, keys)
    some = (first < stop)[..., None] & (first[..., None] < start + keys) & (stop[..., None] > start)
    some = some.reshape(len(first), -1, queries, len(start)).any(2)  # [B, blocks of queries, blocks of keys]
    index = jnp.arange(some.shape[1], dtype=jnp.int32)[:, None]
    low = jnp.where(some, index, some.shape[1]).min(1)
    return low, jnp.where(some, index + 1, 0).max(1)


def _query_kernel(
    q_ref, d_ref, k_ref, v_ref, first_ref, stop_ref, lse_ref, mean_ref, d_q_ref, *, scale, keys
):
    q, d_out, first, stop, lse = q_ref[...], d_ref[...], first_ref[...], stop_ref[...], lse_ref[...]
    mean = mean_ref[...]

    def block(j, d_q):
        at = pl.ds(j * keys, keys)
        k = k_ref[at, :]
        scores, seen = scores_of(q, k.T, first, stop, j * keys, scale)
        weights = jnp.where(seen, jnp.exp(scores - lse[:, None]), 0.0)
        d_scores = weights * (product(d_out, v_ref[at, :].T) - mean[:, None]) * scale
        return d_q + product(d_scores.astype(k.dtype), k)

    low, high = key_blocks(first, stop, keys)
    d_q = jax.lax.fori_loop(low, high, block, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def _key_kernel(*refs, scale, queries):
    (
        q_ref,
        d_ref,
        k_ref,
        v_ref,
        first_ref,
        stop_ref,
        lse_ref,
        mean_ref,
        low_ref,
        high_ref,
        d_k_ref,
        d_v_ref,
    ) = refs
    k, v = k_ref[...], v_ref[...]
    start = pl.program_id(0) * k.shape[0]

    def head(i, sums):
        def block(j, sums):
            at = pl.ds(j * queries, queries)
            q, d_out = q_ref[at, i, :], d_ref[at, i, :]
            scores, seen = scores_of(q, k.T, first_ref[at], stop_ref[at], start, scale)
            weights = jnp.where(seen, jnp.exp(scores - lse_ref[i, at][:, None]), 0.0)
            d_scores = weights * (product(d_out, v.T) - mean_ref[i, at][:, None]) * scale
            d_k = sums[0] + product(d_scores.astype(q.dtype).T, q)
            return d_k, sums[1] + product(weights.astype(d_out.dtype).T, d_out)

        return jax.lax.fori_loop(low_ref[...], high_ref[...], block, sums)

    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
    d_k_ref[...], d_v_ref[...] = d_k.astype(d_k_ref.dtype), d_v.astype(d_v_ref.dtype)
