"""Who attends to whom: the three attention contexts of the one decoder.

A context is a small pytree that a block calls with its queries, keys and values. Training, prefill and
decode differ in nothing else, so they cannot drift apart:

  Causal        rows are independent sequences (plain logits, prefill, supervised training)
  SharedPrefix  a row is one prompt and its K responses; the prompt's keys and values exist once
  Decode        one new token for each of K rows of a prompt, against stored keys and values

Both shared forms attend to two sources, the prompt and the row's own tokens, each with its own softmax,
merged by log-sum-exp. Every real sequence is left-aligned: position = index, padding comes last.

Axes: B rows · P prompts · K responses · S prompt tokens · T response tokens · H query heads ·
G key/value heads · N head width · X tokens of a row, Y keys of a source (inside this file only).
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

# Queries are taken in blocks of this many once a row is longer, each block rematerialised in the backward
# pass: the [X, Y] scores of a whole row never exist at once.
QUERY_BLOCK = 512


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Grouped-query softmax attention over one source, with its normaliser.

    Args:
      q: `[B, X, H, N]`.
      k, v: `[B, Y, G, N]`; each of the G heads serves H / G query heads.
      mask: bool, broadcastable to `[B, X, Y]`; a query without any key gets a finite output and a
        normaliser so low that merging gives it no weight.

    Returns:
      `[B, X, H, N]` in q's dtype and the log-sum-exp of the scaled scores, `[B, X, H]` float32.
    """
    B, X, H, N = q.shape
    mask = jnp.broadcast_to(mask, (B, X, k.shape[1]))
    if X <= QUERY_BLOCK:
        return _attend_block(q, k, v, mask)
    blocks = math.ceil(X / QUERY_BLOCK)
    pad = blocks * QUERY_BLOCK - X

    def split(x):  # [B, X, ...] -> [blocks, B, QUERY_BLOCK, ...]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    block = jax.checkpoint(lambda qm: _attend_block(qm[0], k, v, qm[1]))
    out, lse = jax.lax.map(block, (split(q), split(mask)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, blocks * QUERY_BLOCK, *x.shape[3:])[:, :X]  # noqa: E731
    return join(out), join(lse)


def _attend_block(q, k, v, mask):
    B, X, H, N = q.shape
    G = k.shape[2]
    q = q.reshape(B, X, G, H // G, N)
    scores = jnp.einsum("bxghn,bygn->bghxy", q, k, preferred_element_type=jnp.float32) * N**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bghxy,bygn->bxghn", (weights / total).astype(v.dtype), v)
    lse = (jnp.log(total) + peak)[..., 0]  # [B, G, H/G, X]
    return out.reshape(B, X, H, N), jnp.moveaxis(lse, -1, 1).reshape(B, X, H)


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Joins attention over disjoint sources into attention over their union.

    Args:
      parts: `(out [..., H, N], lse [..., H])` per source, as `attend` returns them.

    Returns:
      `[..., H, N]`: sum of exp(lse_i - lse) out_i, lse the log-sum-exp over all sources.
    """
    lses = jnp.stack([lse for _, lse in parts])
    weights = jax.nn.softmax(lses, axis=0)[..., None]
    return sum((w * out.astype(jnp.float32) for w, (out, _) in zip(weights, parts))).astype(parts[0][0].dtype)


def _within(window: int | None, query_position: jax.Array, key_position: jax.Array) -> jax.Array:
    """Causal, and inside the sliding window where the model has one. Broadcasts to [..., X, Y]."""
    distance = query_position[..., :, None] - key_position[..., None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


@struct.dataclass
class Causal:
    """Independent rows `[B, X]`.

    valid: `[B, X]` bool, real tokens; positions: `[B, X]` of each token in its own sequence.
    keep: whether the block's keys and values are returned (prefill).
    """

    valid: jax.Array
    positions: jax.Array
    window: int | None = struct.field(pytree_node=False, default=None)
    keep: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, q, k, v, kv=None):
        X = q.shape[1]
        mask = _within(self.window, self.positions, self.positions) & self.valid[:, None, :]
        # Indices, not positions, order the padding: a padded query sees itself and so never an empty row.
        mask = (mask & jnp.tri(X, dtype=bool)) | jnp.eye(X, dtype=bool)
        out, _ = attend(q, k, v, mask)
        return out, (k, v) if self.keep else None


@struct.dataclass
class SharedPrefix:
    """Rows `[P, S + K T]`: one prompt, then its K responses, each padded to T.

    lengths: `[P]` real tokens of each prompt. Cost grows with S + K T, not with K (S + T).
    """

    lengths: jax.Array
    prompt_size: int = struct.field(pytree_node=False)  # S
    num_responses: int = struct.field(pytree_node=False)  # K
    window: int | None = struct.field(pytree_node=False, default=None)

    def positions(self, num_tokens: int) -> jax.Array:
        """`[P, S + K T]`: a response continues where its own prompt ends, whatever the padding between."""
        S, K = self.prompt_size, self.num_responses
        P, T = self.lengths.shape[0], (num_tokens - S) // K
        prompt = jnp.broadcast_to(jnp.arange(S), (P, S))
        response = jnp.broadcast_to(self.lengths[:, None, None] + jnp.arange(T), (P, K, T)).reshape(P, K * T)
        return jnp.concatenate([prompt, response], axis=1)

    def __call__(self, q, k, v, kv=None):
        S, K = self.prompt_size, self.num_responses
        P, X, H, N = q.shape
        T = (X - S) // K
        position = self.positions(X)
        prompt_keys = jnp.broadcast_to(jnp.arange(S), (P, S))
        real = jnp.arange(S) < self.lengths[:, None]  # [P, S]

        with jax.named_scope("prompt_self"):
            mask = _within(self.window, prompt_keys, prompt_keys)
            prompt_out, _ = attend(q[:, :S], k[:, :S], v[:, :S], mask)
        with jax.named_scope("response_to_prompt"):  # the K rows as one matrix product
            mask = _within(self.window, position[:, S:], prompt_keys) & real[:, None, :]
            to_prompt = attend(q[:, S:], k[:, :S], v[:, :S], mask)
        with jax.named_scope("response_self"):
            rows = lambda x: x[:, S:].reshape(P * K, T, *x.shape[2:])  # noqa: E731
            step = jnp.arange(T)
            out, lse = attend(rows(q), rows(k), rows(v), _within(self.window, step, step)[None])
            to_self = out.reshape(P, K * T, H, N), lse.reshape(P, K * T, H)
        return jnp.concatenate([prompt_out, merge([to_prompt, to_self])], axis=1), None


@struct.dataclass
class Decode:
    """One token for each of K rows `[P, K]`; row (p, k) is at position lengths[p] + step.

    A layer's storage is `(prompt_k, prompt_v [P, S, G, N], own_k, own_v [P, K, T, G, N])`. All rows write at
    the same index `step`: prompts keep their ragged lengths to themselves. Returns the updated own part.
    """

    lengths: jax.Array
    step: jax.Array
    window: int | None = struct.field(pytree_node=False, default=None)

    def __call__(self, q, k, v, kv):
        prompt_k, prompt_v, own_k, own_v = kv
        P, K, H, N = q.shape
        S, T = prompt_k.shape[1], own_k.shape[2]
        at = (0, 0, self.step, 0, 0)
        own_k = jax.lax.dynamic_update_slice(own_k, k[:, :, None].astype(own_k.dtype), at)
        own_v = jax.lax.dynamic_update_slice(own_v, v[:, :, None].astype(own_v.dtype), at)
        position = jnp.broadcast_to((self.lengths + self.step)[:, None], (P, K))
        keys = jnp.arange(S)
        with jax.named_scope("response_to_prompt"):
            real = keys < self.lengths[:, None]  # [P, S]
            mask = _within(self.window, position, jnp.broadcast_to(keys, (P, S))) & real[:, None, :]
            to_prompt = attend(q, prompt_k, prompt_v, mask)
        with jax.named_scope("response_self"):
            mask = _within(self.window, self.step[None], jnp.arange(T))[None]  # [1, 1, T]
            rows = lambda x: x.reshape(P * K, *x.shape[2:])  # noqa: E731
            out, lse = attend(rows(q)[:, None], rows(own_k), rows(own_v), mask)
            to_self = out.reshape(P, K, H, N), lse.reshape(P, K, H)
        return merge([to_prompt, to_self]), (own_k, own_v)
