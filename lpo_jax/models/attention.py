"""The attention contexts of the decoder.

A context is a small pytree that a block calls with its config, queries, keys and values. Training, prefill and decode
differ only in their context, so they cannot drift apart:

  Causal        rows are independent sequences (plain logits, prefill, supervised training)
  SharedPrefix  a row holds some prompts and their K responses; a prompt's keys and values exist once
  Decode        one new token for each row, with the KV cache of its prompt and its own
  DecodePages   the same, with a KV cache in pages

All but the first attend to several sources, the prompt and the row's own tokens. Each has its own softmax, and the
results are merged by their log-sum-exps. Sequences are left-aligned: position = index, padding comes last.

On TPUs and NVIDIA GPUs all but `Decode` can use kernels (`kernels.choice`); the code here is the plain twin. Kernels
are imported where they run, because importing Pallas takes 0.3 s.

Axes: B rows · P prompts · K responses · S prompt tokens · T response tokens · H query heads ·
G key/value heads · N head width · X tokens of a row, Y keys of a source (inside this file only). Of decoding: R rows ·
U prompts in the cache · C rows of a prompt · Z pages of X tokens · M pages of the longest row.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lpo_jax.models.attend import accumulator, attend
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.eight_bits import dtype_of, load, split, store
from lpo_jax.models.kernels import cudnn, union
from lpo_jax.models.kernels.choice import Attention, chosen
from lpo_jax.models.kernels.union import merge
from lpo_jax.parallel.sharding import on_each_shard


def _within(window: int | None, query_position: jax.Array, key_position: jax.Array) -> jax.Array:
    """The causal mask `[..., X, Y]`, restricted to the sliding window if the model has one."""
    distance = query_position[..., :, None] - key_position[..., None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _first_seen(window: int | None, query_position: jax.Array) -> jax.Array:
    """The first key that a query attends to: 0, or the start of its sliding window."""
    return jnp.zeros_like(query_position) if window is None else jnp.maximum(query_position - window + 1, 0)


def shared_prefix_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    S: int,
    K: int,
    window: int | None = None,
    attention: Attention = "auto",
) -> jax.Array:
    """Attention of rows `[P, S + K T]`, each of one prompt and its K responses, padded to S and T.

    Args:
      q: `[P, S + K T, H, N]`.
      k, v: `[P, S + K T, G, N]`.
      lengths: `[P]` real tokens of each prompt.
      S, K: padded prompt tokens, and responses per prompt.
      window: the number of keys that a query attends to, itself included; None: all before it.
      attention: kernels or plain products.

    Returns:
      `[P, S + K T, H, N]`; finite but meaningless at padding.
    """
    P, X, H, N = q.shape
    attention, _ = chosen(attention, q.dtype, N, window)
    if attention in ("pallas", "interpret"):
        from lpo_jax.models.kernels import splash

        return splash.shared_prefix(q, k, v, lengths, S, K, window, interpret=attention == "interpret")
    if attention != "plain":
        return union.shared_prefix(_gpu_kernel(attention), q, k, v, lengths, S, K, window)
    T = (X - S) // K
    position = shared_prefix_positions(lengths, S, K, T)
    prompt_keys = jnp.broadcast_to(jnp.arange(S), (P, S))
    real = jnp.arange(S) < lengths[:, None]  # [P, S]

    with jax.named_scope("prompt_self"):
        mask = _within(window, prompt_keys, prompt_keys)
        prompt_out, _ = attend(q[:, :S], k[:, :S], v[:, :S], mask, True)
    with jax.named_scope("response_to_prompt"):  # the K rows as one matrix product
        mask = _within(window, position[:, S:], prompt_keys) & real[:, None, :]
        to_prompt = attend(q[:, S:], k[:, :S], v[:, :S], mask)
    with jax.named_scope("response_self"):
        rows = lambda x: x[:, S:].reshape(P * K, T, *x.shape[2:])  # noqa: E731
        step = jnp.arange(T)
        out, lse = attend(rows(q), rows(k), rows(v), _within(window, step, step)[None], True)
        to_self = out.reshape(P, K * T, H, N), lse.reshape(P, K * T, H)
    return jnp.concatenate([prompt_out, merge([to_prompt, to_self])[0]], axis=1)


def _gpu_kernel(attention: Attention) -> union.Kernel:
    if attention == "cudnn":
        return cudnn.KERNEL
    from lpo_jax.models.kernels import triton

    return triton.kernel(interpret=attention == "interpret_triton")


def shared_prefix_positions(lengths: jax.Array, S: int, K: int, T: int) -> jax.Array:
    """Return positions `[P, S + K T]`: a response continues after the last real token of its prompt."""
    P = lengths.shape[0]
    prompt = jnp.broadcast_to(jnp.arange(S), (P, S))
    response = jnp.broadcast_to(lengths[:, None, None] + jnp.arange(T), (P, K, T)).reshape(P, K * T)
    return jnp.concatenate([prompt, response], axis=1)


class Causal(struct.PyTreeNode):
    """Independent rows `[B, X]`.

    Attributes:
      valid: `[B, X]` bool, real tokens.
      positions: `[B, X]` position of each token in its sequence.
      keep: the data type in which the block's keys and values are stored and returned (prefill); queries attend to them
        as they are stored. None: they are not.
      aligned: states that all rows begin with a real token, so that padding comes last.
    """

    valid: jax.Array
    positions: jax.Array
    keep: np.dtype | None = struct.field(pytree_node=False, default=None)
    aligned: bool = struct.field(pytree_node=False, default=False)
    attention: Attention = struct.field(pytree_node=False, default="auto")

    def __call__(self, config: ModelConfig, q, k, v, kv=None):
        if self.keep is None:
            return self._attend(config.sliding_window, q, k, v), None
        kept = store(k, self.keep), store(v, self.keep)
        return self._attend(config.sliding_window, q, *(load(x, q.dtype) for x in kept)), kept

    def _attend(self, window, q, k, v):
        _, X, _, N = q.shape
        attention, _ = chosen(self.attention, q.dtype, N, window)
        if attention in ("pallas", "interpret"):
            from lpo_jax.models.kernels import splash

            return splash.causal(q, k, v, self.valid, window, interpret=attention == "interpret")
        if attention != "plain":
            # cuDNN counts keys from the start of a row.
            kernel = _gpu_kernel(attention if self.aligned or attention != "cudnn" else "triton")
            return union.causal(kernel, q, k, v, self.valid, window)
        mask = _within(window, self.positions, self.positions) & self.valid[:, None, :]
        # Padding is ordered by index, and every query attends to itself, so that no row of the mask is empty.
        mask = (mask & jnp.tri(X, dtype=bool)) | jnp.eye(X, dtype=bool)
        return attend(q, k, v, mask, True)[0]


class SharedPrefix(struct.PyTreeNode):
    """Rows of p prompts with K responses each, padded `[B, p (S + K T)]` or packed `[B, C]`.

    Attention runs on the padded form. Its cost grows with S + K T, not with K (S + T).

    Attributes:
      lengths: `[B, p]` real tokens of each prompt.
      unpack: `[B, p (S + K T)]` index in the packed row of each token of the padded row; past the end for padding. None
        if rows are padded already.
      pack: `[B, C]`, the inverse of `unpack`.
    """

    lengths: jax.Array
    unpack: jax.Array | None
    pack: jax.Array | None
    prompt_size: int = struct.field(pytree_node=False)  # S
    num_responses: int = struct.field(pytree_node=False)  # K
    response_size: int = struct.field(pytree_node=False)  # T
    attention: Attention = struct.field(pytree_node=False, default="auto")

    def positions(self) -> jax.Array:
        """Return the position `[B, C]` of each of the row's tokens in its sequence."""
        S, K, T = self.prompt_size, self.num_responses, self.response_size
        positions = shared_prefix_positions(self.lengths.reshape(-1), S, K, T).reshape(len(self.lengths), -1)
        return positions if self.pack is None else _gather_rows(positions, self.pack)

    def __call__(self, config: ModelConfig, q, k, v, kv=None):
        S, K, B = self.prompt_size, self.num_responses, len(self.lengths)
        lengths = self.lengths.reshape(-1)
        if self.unpack is not None:
            q, k, v = (rearrange(x, self.unpack, self.pack) for x in (q, k, v))
        q, k, v = (x.reshape(len(lengths), -1, *x.shape[2:]) for x in (q, k, v))
        out = shared_prefix_attention(q, k, v, lengths, S, K, config.sliding_window, self.attention)
        out = out.reshape(B, -1, *out.shape[2:])
        return (out if self.pack is None else rearrange(out, self.pack, self.unpack)), None


@jax.custom_vjp
def rearrange(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Gather `x[b, index[b]]` in each row, 0 where the index is past the end. The gradient is a gather by `inverse`."""
    return _gather_rows(x, index)


rearrange.defvjp(
    lambda x, index, inverse: (_gather_rows(x, index), inverse),
    lambda inverse, cotangent: (_gather_rows(cotangent, inverse), None, None),
)


def _gather_rows(x, index):
    return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0))(x, index)


class Decode(struct.PyTreeNode):
    """One new token for each of R rows, `[R, 1]`, with the KV cache of its prompt and its own.

    The cache of a layer is `(prompt_k [U, G, N, S], prompt_v [U, G, S, N], own_k [R, G, N, T], own_v [R, G, T, N])` for
    U prompts. This layout suits the products, so that no step transposes the cache. All rows write at the same index
    `at`, with one slice update; the tokens of a row are those from its `first` to `at`. The C rows of a prompt attend
    to it together, as one matrix product. A call returns the updated `own_k` and `own_v`.

    Attributes:
      prompt_lengths: `[U]` keys of each prompt.
      positions: `[R]` position of the new token.
      first: `[R]` index of the row's first own key.
      at: the index that all rows write at.
      members: `[U, C]` the rows of each prompt, with any row in free slots. None: rows are ordered by prompt, R / U
        each. On a mesh, rows are counted within the shard.
      slots: `[R]` the index of each row among these U C slots, within the shard.
    """

    prompt_lengths: jax.Array
    positions: jax.Array
    first: jax.Array
    at: jax.Array
    members: jax.Array | None = None
    slots: jax.Array | None = None

    def __call__(self, config: ModelConfig, q, k, v, kv):
        prompt_k, prompt_v, own_k, own_v = kv
        R, _, H, N = q.shape
        window = config.sliding_window
        own_k, own_v = _write(own_k, own_v, k, v, self.at)
        q = q.reshape(R, k.shape[2], -1, N)
        with jax.named_scope("response_to_prompt"):
            queries, start = _by_prompt(
                q, _first_seen(window, self.positions), self.members, len(self.prompt_lengths)
            )
            found = attend_cached(queries, prompt_k, prompt_v, start, self.prompt_lengths)
            to_prompt = _by_row(found, self.slots)
        with jax.named_scope("response_self"):
            start = jnp.maximum(self.first, _first_seen(window, self.at))[:, None]  # [R, 1]
            stop = jnp.broadcast_to(self.at + 1, R)
            out, lse = attend_cached(q[:, :, None], own_k, own_v, start, stop)
        out, _ = merge([to_prompt, (out[:, :, 0], lse[:, :, 0])])
        return out.reshape(R, 1, H, N), (own_k, own_v)


class DecodePages(struct.PyTreeNode):
    """One new token for each of R rows, `[R, 1]`, with a KV cache in pages.

    The cache of a layer is `(pool [Z, 2, G, N, X], recent_k [R, G, N, T], recent_v [R, G, T, N])`. Prompts, and the
    tokens that rows have drawn in earlier calls of `sampling.decode`, are in pages. The T tokens of the current call
    are beside them, where all rows write at the same index, so that no token has to find its page. A call returns the
    updated `recent_k` and `recent_v`. On a mesh, rows and pages are counted within the shard.

    Attributes:
      prompt_lengths: `[U]` keys of each prompt.
      prompt_table: `[U, ...]` pages of each prompt, as in `attend_pages`.
      stored: `[R]` own tokens of each row in pages.
      table: `[R, M]` their pages.
      at: the index that all rows write at: tokens drawn before in this call.
      positions: `[R]` position of the new token.
      members: `[U, C]` the rows of each prompt, with any row in free slots.
      slots: `[R]` the index of each row among these U C slots.
    """

    prompt_lengths: jax.Array
    prompt_table: jax.Array
    stored: jax.Array
    table: jax.Array
    at: jax.Array
    positions: jax.Array
    members: jax.Array
    slots: jax.Array
    attention: Attention = struct.field(pytree_node=False, default="auto")

    def __call__(self, config: ModelConfig, q, k, v, kv):
        pool, recent_k, recent_v = kv
        R, _, H, N = q.shape
        window = config.sliding_window
        recent_k, recent_v = _write(recent_k, recent_v, k, v, self.at)
        q = q.reshape(R, k.shape[2], -1, N)
        with jax.named_scope("response_to_prompt"):
            start = _first_seen(window, self.positions)
            queries, start = _by_prompt(q, start, self.members, len(self.prompt_table))
            found = attend_pages(queries, pool, self.prompt_table, start, self.prompt_lengths, self.attention)
            to_prompt = _by_row(found, self.slots)
        first = _first_seen(window, self.stored + self.at)[:, None]  # [R, 1]: counted in the row's own tokens
        q = q[:, :, None]
        with jax.named_scope("response_to_pages"):
            stored = attend_pages(q, pool, self.table, first, self.stored, self.attention)
        with jax.named_scope("response_self"):
            stop = jnp.broadcast_to(self.at + 1, R)
            recent = attend_cached(q, recent_k, recent_v, first - self.stored[:, None], stop)
        own = [(out[:, :, 0], lse[:, :, 0]) for out, lse in (stored, recent)]
        return merge([to_prompt, *own])[0].reshape(R, 1, H, N), (recent_k, recent_v)


def _write(own_k, own_v, k, v, at):
    """Write the keys and values of new tokens, `[R, 1, G, N]`, at the same index of all rows."""
    R, _, G, N = k.shape
    put = lambda old, new, index: jax.tree.map(  # noqa: E731
        lambda x, y: jax.lax.dynamic_update_slice(x, y, index), old, new
    )
    own_k = put(own_k, store(k.reshape(R, G, N, 1), dtype_of(own_k), 2), (0, 0, 0, at))
    own_v = put(own_v, store(v.reshape(R, G, 1, N), dtype_of(own_v), 3), (0, 0, at, 0))
    return own_k, own_v


def _by_prompt(q, start, members, U: int):
    """Queries `[R, G, I, N]` and first keys `[R]` of rows -> `[U, G, C, I, N]` and `[U, C]`."""

    def take(x):
        if members is None:
            return x.reshape(U, -1, *x.shape[1:])
        return on_each_shard(lambda x, members: x[members], x, members)

    return jnp.swapaxes(take(q), 1, 2), take(start)


def _by_row(found, slots):
    """Outputs and log-sum-exps `[U, G, C, ...]` -> `[R, G, ...]`."""

    def take(x):
        x = jnp.swapaxes(x, 1, 2)
        x = x.reshape(-1, *x.shape[2:])
        return x if slots is None else on_each_shard(lambda x, slots: x[slots], x, slots)

    return tuple(map(take, found))


Context = Causal | SharedPrefix | Decode | DecodePages


def attend_cached(q, k, v, start, stop) -> tuple[jax.Array, jax.Array]:
    """Attention to the cached keys `start[b, c] <= y < stop[b]`, with its normaliser.

    Args:
      q: `[B, G, C, I, N]`, C queries for each of the I query heads of a key/value head.
      k: `[B, G, N, Y]`, floats or 8-bit numbers with scales.
      v: `[B, G, Y, N]`.
      start: `[B, C]`.
      stop: `[B]`.

    Returns:
      `[B, G, C, I, N]`, and the log-sum-exp of the scaled scores `[B, G, C, I]` float32.
    """
    (k, k_scale), (v, v_scale) = split(k, q.dtype), split(v, q.dtype)
    index = jnp.arange(k.shape[-1])
    mask = (index >= start[..., None]) & (index < stop[:, None, None])  # [B, C, Y]
    B, G, C, I, N = q.shape
    scores = jnp.einsum(
        "bgin,bgny->bgiy", q.reshape(B, G, C * I, N), k, preferred_element_type=accumulator(q.dtype)
    ).reshape(B, G, C, I, -1)
    if k_scale is not None:
        scores *= k_scale[:, :, :, None]  # [B, G, 1, 1, Y]
    scores = jnp.where(mask[:, None, :, None], scores * N**-0.5, jnp.finfo(jnp.float32).min)
    peak = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    if v_scale is not None:
        weights *= jnp.swapaxes(v_scale, 2, 3)[:, :, :, None]
    out = jnp.einsum("bgiy,bgyn->bgin", weights.astype(v.dtype).reshape(B, G, C * I, -1), v)
    return out.reshape(q.shape) / total.astype(v.dtype), (jnp.log(total) + peak)[..., 0]


def attend_pages(q, pool, table, start, stop, attention: Attention = "auto") -> tuple[jax.Array, jax.Array]:
    """Attention to keys in pages, `start[b, c] <= y < stop[b]`, with its normaliser.

    Args:
      q: `[B, G, C, I, N]`, C queries for each of the I query heads of a key/value head.
      pool: `[Z, 2, G, N, X]`, keys and values of each page, floats or 8-bit numbers with scales.
      table: `[B, M]` the page of key y is `table[b, y // X]`; what is listed behind the last key is not read.
      start: `[B, C]`.
      stop: `[B]`.
      attention: kernels or plain products.

    Returns:
      `[B, G, C, I, N]`, and the log-sum-exp of the scaled scores `[B, G, C, I]` float32.
    """
    attention, _ = chosen(attention, q.dtype, q.shape[-1], None)
    if attention in ("pallas", "interpret"):
        from lpo_jax.models.kernels import pages

        return pages.attend_pages(q, pool, table, start, stop, interpret=attention == "interpret")
    if attention != "plain":
        from lpo_jax.models.kernels import triton_pages

        interpret = attention == "interpret_triton"
        return triton_pages.attend_pages(q, pool, table, start, stop, interpret=interpret)
    by_leaf = jax.tree.map(lambda x: on_each_shard(_gather_pages, table, x), pool)
    k, v = jax.tree.transpose(jax.tree.structure(pool), jax.tree.structure((0, 0)), by_leaf)
    return attend_cached(q, k, v, start, stop)


def _gather_pages(table, pool):
    """The pages of each row one after another: keys `[B, G, N, M X]` and values `[B, G, M X, N]`."""
    (B, M), (Z, _, G, N, X) = table.shape, pool.shape
    found = pool[jnp.clip(table, 0, Z - 1)]  # [B, M, 2, G, N, X]
    k, v = jnp.moveaxis(found, (2, 1), (0, 4))  # [B, G, N, M, X] each
    return k.reshape(B, G, N, M * X), jnp.swapaxes(v.reshape(B, G, N, M * X), 2, 3)
