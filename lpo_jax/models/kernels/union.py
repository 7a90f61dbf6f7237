"""Attention to the union of several sources by kernels that attend to one source each, with its gradient.

A response attends to its prompt, whose keys exist once for K responses, and to itself. A kernel computes each of the
two with its log-sum-exp, and `merge` combines them. In the backward pass, each kernel receives the merged output and
the merged log-sum-exp in the place of its own: with scores s, the weights exp(s - lse) are then those of the union, and
so is the sum over output times cotangent that the softmax subtracts. The sum of the parts is the exact gradient, as in
ring attention (arXiv 2310.01889), and no gradient of a log-sum-exp is needed. Autodiff of the merge would need it, but
cuDNN's attention in JAX ignores the cotangent of the log-sum-exp.

This file depends on no kernel. Its plain twins are `Causal` and `shared_prefix_attention` in
`lpo_jax.models.attention`.

Axes: B rows · X queries, Y keys of a source · H query heads · G key/value heads · N head width · P prompts ·
K responses · S prompt tokens · T response tokens.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from lpo_jax.models.attend import KEPT, accumulator
from lpo_jax.models.kernels.devices import on_each_device

HEADS = ("batch", None, "kv_heads")


class KeySource(struct.PyTreeNode):
    """Keys and values, and which of them each query attends to: query x of row b to `first[b, x] <= y < stop[b, x]`.

    Attributes:
      k, v: `[B, Y, G, N]`.
      first, stop: `[B, X]` int32. A query without keys has a `stop` that is not greater than its `first`.
      causal: states that X = Y and stop = x + 1. If it is false, all queries of a row have the same `stop`.
    """

    k: jax.Array
    v: jax.Array
    first: jax.Array
    stop: jax.Array
    causal: bool = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Attention to one source, forward and backward. With q `[B, X, H, N]` and a log-sum-exp `[B, X, H]` float32:

    Attributes:
      forward: `(q, source) -> out, lse`, out as q. A query without keys gets a finite output, and a log-sum-exp so low
        that `merge` gives it no weight.
      backward: `(q, source, out, lse, d_out) -> d_q, d_k, d_v`, in the dtypes of q, k and v. `out` and `lse` may be
        those of a union of which the source is a part.
    """

    forward: Callable
    backward: Callable


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Merge attention over disjoint sources into attention over their union.

    Args:
      parts: `(out [..., H, N], lse [..., H])` for each source.

    Returns:
      `[..., H, N]`, the sum of exp(lse_i - lse) out_i, and lse `[..., H]`, the log-sum-exp over all sources.
    """
    lses = jnp.stack([lse for _, lse in parts])
    weights = jax.nn.softmax(lses, axis=0)[..., None]
    dtype = parts[0][0].dtype
    out = sum((w * out.astype(accumulator(dtype)) for w, (out, _) in zip(weights, parts))).astype(dtype)
    return out, jax.nn.logsumexp(lses, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_union(kernel: Kernel, q: jax.Array, sources: tuple[KeySource, ...]) -> jax.Array:
    """Attend to the union of disjoint sources.

    Args:
      kernel: the attention to one source.
      q: `[P, X, H, N]`. For a source of B rows, it is read as `[B, P X / B, H, N]`.
      sources: of P rows or of a multiple.

    Returns:
      `[P, X, H, N]` in q's dtype.
    """
    return _forward(kernel, q, sources)[0]


def _forward(kernel, q, sources):
    parts = []
    for source in sources:
        out, lse = kernel.forward(_rows_of(source, q), source)
        parts.append((out.reshape(q.shape), lse.reshape(q.shape[:-1])))
    out, lse = merge(parts) if len(parts) > 1 else parts[0]
    out, lse = checkpoint_name(out, KEPT), checkpoint_name(lse, KEPT)
    return out, (q, sources, out, lse)


def _backward(kernel, kept, d_out):
    q, sources, *results = kept
    d_qs, d_sources = [], []
    for source in sources:
        rows = [_rows_of(source, x) for x in (q, *results, d_out)]
        d_q, d_k, d_v = kernel.backward(rows[0], source, *rows[1:])
        d_qs.append(d_q.reshape(q.shape))
        d_sources.append(source.replace(k=d_k, v=d_v, first=None, stop=None))
    d_q = sum(d_q.astype(accumulator(q.dtype)) for d_q in d_qs).astype(q.dtype)
    return d_q, tuple(d_sources)


attend_union.defvjp(_forward, _backward)


def _rows_of(source: KeySource, x: jax.Array) -> jax.Array:
    """`[P, X, ...]` -> `[B, P X / B, ...]`."""
    return x.reshape(len(source.k), -1, *x.shape[2:])


def causal(kernel: Kernel, q, k, v, valid, window: int | None = None) -> jax.Array:
    """Causal attention of independent rows; arguments as in `splash.causal`."""

    def attention(q, k, v, valid):
        begin = jnp.argmax(valid, axis=1).astype(jnp.int32)[:, None]
        first, stop = _before(window, len(q), q.shape[1])
        return attend_union(kernel, q, (KeySource(k, v, jnp.maximum(first, begin), stop, causal=True),))

    return on_each_device(attention, HEADS, q, k, v, valid)


def shared_prefix(kernel: Kernel, q, k, v, lengths, S: int, K: int, window: int | None = None) -> jax.Array:
    """Attention of rows of one prompt and its K responses; arguments as in `shared_prefix_attention`."""

    def attention(q, k, v, lengths):
        P, X = q.shape[:2]
        T = (X - S) // K
        prompt = KeySource(k[:, :S], v[:, :S], *_before(window, P, S), causal=True)
        prompt_out = attend_union(kernel, q[:, :S], (prompt,))
        position = lengths[:, None] + jnp.tile(jnp.arange(T, dtype=jnp.int32), K)  # [P, K T]
        stop = jnp.broadcast_to(lengths[:, None], position.shape)
        to_prompt = KeySource(k[:, :S], v[:, :S], _first_seen(window, position), stop, causal=False)
        own = [x[:, S:].reshape(P * K, T, *x.shape[2:]) for x in (k, v)]
        to_self = KeySource(*own, *_before(window, P * K, T), causal=True)
        return jnp.concatenate([prompt_out, attend_union(kernel, q[:, S:], (to_prompt, to_self))], axis=1)

    return on_each_device(attention, HEADS, q, k, v, lengths.astype(jnp.int32))


def _before(window: int | None, B: int, X: int) -> tuple[jax.Array, jax.Array]:
    """The first key and the one behind the last, `[B, X]`, of queries that attend to all up to their own index."""
    index = jnp.broadcast_to(jnp.arange(X, dtype=jnp.int32), (B, X))
    return _first_seen(window, index), index + 1


def _first_seen(window: int | None, position: jax.Array) -> jax.Array:
    return jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0)
