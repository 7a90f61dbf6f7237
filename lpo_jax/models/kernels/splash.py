"""Attention on TPUs through splash attention, the Pallas kernel that jax ships: no scores in memory, and blocks
that nobody may see are never computed.

The plain twins are `Causal` and `shared_prefix_attention` in `lpo_jax.models.attention`. The kernel takes one array
of keys per row, so the shared form lays the prompt's keys in front of each response's own, in the copy that the
kernel's head-major layout needs anyhow: K rows of T queries and S + T keys. One row with one mask would spare these
(K - 1) S keys of one layer, but the kernel for the gradient of the keys visits as many blocks of queries for each
block of keys as the most wanted one needs, and every response wants the prompt: ((S + K T) / block)^2 visits, nearly
all of them idle, where K rows need K (S + T) T / block^2.

Axes: B rows · P prompts · K responses · S prompt tokens · T response tokens · X queries · H query heads ·
G key/value heads · N head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from lpo_jax.models.kernels.devices import on_each_device

# A block's scores are [QUERIES, KEYS] float32, 2 MiB: with what the backward kernels hold beside them this fits the
# 16 MiB that the compiler grants a kernel on v5e, v5p and v6e, in float32 too.
QUERIES, KEYS = 512, 1024
LANES = 128  # a block is a multiple of this
HEADS = ("batch", None, "kv_heads")


def causal(q, k, v, valid, window: int | None = None, *, interpret: bool = False) -> jax.Array:
    """Each row attends to itself, up to and including the query; real tokens see real ones only.

    Args:
      q: `[B, X, H, N]`; k, v: `[B, X, G, N]`.
      valid: `[B, X]` bool; the real tokens of a row stand together.
      interpret: run on any device, slowly.

    Returns:
      `[B, X, H, N]`; where the row is padding: finite, and of no meaning.
    """

    def attention(q, k, v, valid):
        return _attend(q, k, v, valid, valid, 0, window, interpret)

    return on_each_device(attention, HEADS, q, k, v, valid)


def shared_prefix(q, k, v, lengths, S: int, K: int, window: int | None = None, *, interpret: bool = False):
    """`shared_prefix_attention`: rows `[P, S + K T]` of one prompt, then its K responses."""

    def attention(q, k, v, lengths):
        P, X = q.shape[:2]
        T = (X - S) // K
        real = jnp.arange(S) < lengths[:, None]  # [P, S]
        prompt_out = _attend(q[:, :S], k[:, :S], v[:, :S], real, real, 0, window, interpret)
        if window is not None:  # shift prompts to end where responses begin: distances are those of indices
            real = real[:, ::-1]

        def behind_prompt(own, prompt):  # [P, K T, ...], [P, S, ...] -> [P K, S + T, ...]
            prompt = jnp.repeat(prompt, K, axis=0)
            return jnp.concatenate([prompt, own.reshape(P * K, T, *own.shape[2:])], axis=1)

        def keys(x):
            prompt = (
                x[:, :S] if window is None else jax.vmap(jnp.roll, (0, 0, None))(x[:, :S], S - lengths, 0)
            )
            return behind_prompt(x[:, S:], prompt)

        responses = jnp.ones((P, K * T), bool)
        queries = q[:, S:].reshape(P * K, T, *q.shape[2:])
        seen = behind_prompt(responses, real)
        out = _attend(queries, keys(k), keys(v), seen[:, S:], seen, S, window, interpret)
        return jnp.concatenate([prompt_out, out.reshape(P, K * T, *q.shape[2:])], axis=1)

    return on_each_device(attention, HEADS, q, k, v, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, query_real, key_real, offset, window, interpret):
    """Query i stands at key `offset + i` and sees this key and those before it, as far as both are real or neither.

    q `[B, X, H, N]`, k and v `[B, offset + X, G, N]`, what is real `[B, X]` and `[B, offset + X]`.
    """
    B, X, H, N = q.shape
    num_queries, queries = _blocks(X, QUERIES)
    num_keys, keys = _blocks(
        offset + num_queries, KEYS
    )  # all queries have a key to see, the padding too: their own
    mask = masks.LocalMask((num_queries, num_keys), (None if window is None else window - 1, 0), offset)
    sizes = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), queries)
    sizes |= dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), keys)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def pad(x, size):
        return jnp.pad(x, [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    def heads_first(x, size):
        return jnp.moveaxis(pad(x, size), 2, 1)

    segments = splash.SegmentIds(
        pad(query_real, num_queries).astype(jnp.int32), pad(key_real, num_keys).astype(jnp.int32)
    )
    with jax.default_matmul_precision("float32" if q.dtype == jnp.float32 else "default"):
        out = jax.vmap(kernel)(
            heads_first(q * N**-0.5, num_queries),
            heads_first(k, num_keys),
            heads_first(v, num_keys),
            segments,
        )
    return jnp.moveaxis(out, 1, 2)[:, :X]


# The kernel's own backward pass is traced when nobody's precision is in force: it is put in force again here.
def _attend_forward(q, k, v, query_real, key_real, *static):
    return jax.vjp(lambda q, k, v: _attend.__wrapped__(q, k, v, query_real, key_real, *static), q, k, v)


def _attend_backward(offset, window, interpret, pull_back, cotangent):
    with jax.default_matmul_precision("float32" if cotangent.dtype == jnp.float32 else "default"):
        return *pull_back(cotangent), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _blocks(size: int, most: int) -> tuple[int, int]:
    """The fewest blocks of at most `most` that cover `size`, all as short as lanes allow: their sum, and one's size."""
    count = math.ceil(size / most)
    block = LANES * math.ceil(size / (count * LANES))
    return count * block, block
