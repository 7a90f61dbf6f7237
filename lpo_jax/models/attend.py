"""Softmax attention over one source in plain matrix products.

The custom gradient recomputes the attention weights from the log-sum-exp, block by block, so that the `[X, Y]` scores
of a long row never exist at once. Only the output and one number per query and head are kept for the backward pass. All
products have the form [rows, n] x [n, columns] in the layout in which the operands are stored, because XLA for CPUs
takes longer to transpose a matrix of scores than to compute the product.

Axes: B rows · X queries, Y keys of a source · H query heads · G key/value heads · I = H / G query heads of each ·
N head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Queries times keys of a block, and the fewest queries of a block. The operations between the two products read and
# write the scores many times, so the scores of a block should fit into the core's cache.
BLOCK_SCORES = 1 << 15
FEWEST_QUERIES = 128
# Where no query attends to later keys, a row is split into at most this many strips, each with the keys it attends to.
STRIPS = 8
# The name, for checkpoint policies, of the output and normaliser. If they are saved, the backward pass does not
# recompute the forward pass.
KEPT = "attention"
LOWEST = jnp.finfo(jnp.float32).min  # the score of a masked key


def accumulator(dtype) -> jnp.dtype:
    """Return the dtype in which products of `dtype` are summed and norms computed: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, ordered: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query softmax attention over one source, with its normaliser.

    Args:
      q: `[B, X, H, N]`.
      k, v: `[B, Y, G, N]`; each of the G heads serves H / G query heads.
      mask: bool, three axes, broadcastable to `[B, X, Y]`. A query without any key gets a finite output and a
        normaliser so low that `merge` gives it no weight.
      ordered: whether X = Y and no query attends to a key of a higher index. `mask` has to agree.

    Returns:
      `[B, X, H, N]` in q's dtype and the log-sum-exp of the scaled scores, `[B, X, H]` float32.
    """
    return _forward(q, k, v, mask, ordered)[0]


def _forward(q, k, v, mask, ordered):
    X, Y = q.shape[1], k.shape[1]
    mask = jnp.broadcast_to(mask, (len(mask), X, Y))
    keys, values = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)  # [B, G, N, Y], [B, G, Y, N]
    results = []
    for start, stop, seen in _strips(X, Y, ordered):

        def block(carry, arrays, seen=seen):
            return carry, _attend_block(keys[..., :seen], values[:, :, :seen], *arrays)

        strip = q[:, start:stop], mask[:, start:stop, :seen]
        results.append(_by_blocks(block, (), queries_at_once(X, Y), strip)[1])
    out, lse = (checkpoint_name(jnp.concatenate(parts, 1), KEPT) for parts in zip(*results))
    return (out, lse), (q, k, v, mask, lse)


def _attend_block(keys, values, q, mask):
    """`q [B, X, H, N]`, `mask [B, X, Y]` -> `[B, X, H, N]` and the log-sum-exp `[B, X, H]`."""
    G = keys.shape[1]
    scores = _scores(_rows(q, G), keys, mask)
    peak = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    out = _product("bgxy,bgyn->bgxn", _flat(weights / total).astype(q.dtype), values)
    return _whole(out, q.shape).astype(q.dtype), _whole(_flat(peak + jnp.log(total)), q.shape)[..., 0]


def _backward(ordered, kept, cotangents):
    q, k, v, mask, lse = kept
    d_out, d_lse = cotangents
    X, Y = q.shape[1], k.shape[1]
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)  # [B, G, N, Y]
    d_keys = d_values = jnp.zeros(keys.shape, accumulator(keys.dtype))
    d_q = []
    for start, stop, seen in _strips(X, Y, ordered):

        def block(sums, arrays, seen=seen):
            more, d_block = _backward_block(keys[..., :seen], values[..., :seen], *arrays)
            return jax.tree.map(jnp.add, sums, more), d_block

        sums = d_keys[..., :seen], d_values[..., :seen]
        strip = [x[:, start:stop] for x in (q, mask[..., :seen], lse, d_out, d_lse)]
        sums, d_strip = _by_blocks(block, sums, queries_at_once(X, Y), strip)
        d_keys, d_values = d_keys.at[..., :seen].set(sums[0]), d_values.at[..., :seen].set(sums[1])
        d_q.append(d_strip)
    d_k, d_v = (x.transpose(0, 3, 1, 2).astype(k.dtype) for x in (d_keys, d_values))
    return jnp.concatenate(d_q, 1), d_k, d_v, None


def _backward_block(keys, values, q, mask, lse, d_out, d_lse):
    """The gradients of `keys` and `values`, `[B, G, N, Y]` float32, and of `q`, `[B, X, H, N]`."""
    X, G = q.shape[1], keys.shape[1]
    rows, d_rows = _rows(q, G), _rows(d_out, G)
    lse, d_lse = (_rows(x[..., None], G).reshape(len(x), G, -1, X, 1) for x in (lse, d_lse))
    weights = jnp.exp(_scores(rows, keys, mask) - lse)
    # Normalise again, because the recomputed scores may be rounded differently. The weights are 0 for a query without
    # any key.
    total = jnp.maximum(weights.sum(-1, keepdims=True), 0.5)
    weights *= jnp.where(lse > LOWEST / 2, 1 / total, 0.0)
    d_weights = _product("bgxn,bgny->bgxy", d_rows, values).reshape(weights.shape)
    # The product of output and cotangent is the same up to rounding, but with this mean the gradient of the scores sums
    # to 0 exactly.
    mean = (weights * d_weights).sum(-1, keepdims=True)
    d_scores = _flat(weights * (d_weights - mean + d_lse) * q.shape[-1] ** -0.5).astype(q.dtype)
    d_values = _product("bgnx,bgxy->bgny", d_rows.swapaxes(2, 3), _flat(weights).astype(q.dtype))
    d_keys = _product("bgnx,bgxy->bgny", rows.swapaxes(2, 3), d_scores)
    d_q = _product("bgxy,bgyn->bgxn", d_scores, keys.swapaxes(2, 3))
    return (d_keys, d_values), _whole(d_q, q.shape).astype(q.dtype)


attend.defvjp(_forward, _backward)


def _product(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum accumulated in float32.

    The operands' dtype sets the precision, because a backward pass is traced outside the caller's precision context.
    """
    precision = "float32" if x.dtype == jnp.float32 else "default"
    return jnp.einsum(axes, x, y, precision=precision, preferred_element_type=accumulator(x.dtype))


def _scores(rows: jax.Array, keys: jax.Array, mask: jax.Array) -> jax.Array:
    """Quantised and masked scores `[B, G, I, X, Y]` of `rows [B, G, I X, N]` and `keys [B, G, N, Y]`."""
    scores = _product("bgxn,bgny->bgxy", rows, keys) * rows.shape[-1] ** -0.5
    scores = scores.reshape(*rows.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], scores, LOWEST)


def _rows(x: jax.Array, G: int) -> jax.Array:
    """`[B, X, H, N]` -> `[B, G, I X, N]`, the layout of the products."""
    B, X, H, N = x.shape
    return x.reshape(B, X, G, H // G, N).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, N)


def _flat(x: jax.Array) -> jax.Array:
    """`[B, G, I, X, Y]` -> `[B, G, I X, Y]`."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _whole(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_rows`: `[B, G, I X, N]` -> `[B, X, H, N]`, with B, X and H from `shape`."""
    B, X, H = shape[:3]
    G = x.shape[1]
    return x.reshape(B, G, H // G, X, -1).transpose(0, 3, 1, 2, 4).reshape(B, X, H, -1)


def _strips(X: int, Y: int, ordered: bool) -> list[tuple[int, int, int]]:
    """Split a row into strips of whole blocks: (first query, last + 1, number of keys it attends to) of each."""
    if not ordered:
        return [(0, X, Y)]
    block = queries_at_once(X, Y)
    size = block * math.ceil(X / (block * STRIPS))
    return [(start, min(start + size, X), min(start + size, X)) for start in range(0, X, size)]


def queries_at_once(X: int, Y: int) -> int:
    """Queries computed at once in a row of X queries and Y keys."""
    return min(X, max(FEWEST_QUERIES, BLOCK_SCORES // Y))


def _by_blocks(step, carry, size: int, arrays):
    """Scan `step(carry, block) -> carry, results` over `[B, X, ...]`, `size` queries at a time; concatenate results."""
    X = arrays[0].shape[1]
    if X <= size:
        return step(carry, arrays)
    blocks = math.ceil(X / size)

    def split(x):  # [B, X, ...] -> [blocks, B, size, ...]; padding has no keys
        x = jnp.pad(x, [(0, 0), (0, blocks * size - X)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), blocks, size, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], blocks * size, *x.shape[3:])[:, :X]

    carry, results = jax.lax.scan(step, carry, [split(x) for x in arrays])
    return carry, jax.tree.map(join, results)
