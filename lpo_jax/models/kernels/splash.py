"""Attention on TPUs by splash attention, the Pallas kernel in JAX.

Scores are never stored in main memory, and fully masked blocks are not computed. The plain twins are `Causal` and
`shared_prefix_attention` in `lpo_jax.models.attention`.

The kernel takes one array of keys per row, so the shared-prefix form puts the prompt's keys before each response's own:
K rows of T queries and S + T keys. The copy is free, because the kernel's head-major layout needs one anyway. A single
row with one mask would save these (K - 1) S keys of one layer, but it would be slower: for every block of keys, the
kernel for the gradient of the keys visits as many blocks of queries as the block of keys with the most queries needs,
and all responses attend to the prompt. That is ((S + K T) / block)^2 visits, nearly all of them idle, instead of
K (S + T) T / block^2.

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

# The scores of a block are [QUERIES, KEYS] float32, 2 MiB. Together with the other arrays of the backward kernels they
# fit into the 16 MiB that the compiler gives a kernel on v5e, v5p and v6e, for float32 inputs too.
QUERIES, KEYS = 512, 1024
LANES = 128  # block sizes are multiples of this
HEADS = ("batch", None, "kv_heads")


def causal(q, k, v, valid, window: int | None = None, *, interpret: bool = False) -> jax.Array:
    """Causal attention of independent rows; real tokens attend to real tokens only.

    Args:
      q: `[B, X, H, N]`.
      k, v: `[B, X, G, N]`.
      valid: `[B, X]` bool; the real tokens of a row are contiguous.
      window: the number of keys that a query attends to, itself included; None: all before it.
      interpret: run in the interpreter, on any device but slowly.

    Returns:
      `[B, X, H, N]`; finite but meaningless at padding.
    """

    def attention(q, k, v, valid):
        return _attend(q, k, v, valid, valid, 0, window, interpret)

    return on_each_device(attention, HEADS, q, k, v, valid)


def shared_prefix(q, k, v, lengths, S: int, K: int, window: int | None = None, *, interpret: bool = False):
    """Attention of rows of one prompt and its K responses; arguments as in `shared_prefix_attention`."""

    def attention(q, k, v, lengths):
        P, X = q.shape[:2]
        T = (X - S) // K
        real = jnp.arange(S) < lengths[:, None]  # [P, S]
        prompt_out = _attend(q[:, :S], k[:, :S], v[:, :S], real, real, 0, window, interpret)
        # With a window, shift prompts to end where responses begin, so that distances are differences of indices.
        if window is not None:
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
    """Attend from query i to the keys up to `offset + i` for which key and query are both real or both padding.

    Shapes: q `[B, X, H, N]`, k and v `[B, offset + X, G, N]`, query_real `[B, X]`, key_real `[B, offset + X]`.
    """
    B, X, H, N = q.shape
    num_queries, queries = _blocks(X, QUERIES)
    # Padded queries need a key too: there is one at the position of every query.
    num_keys, keys = _blocks(offset + num_queries, KEYS)
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


# The kernel's backward pass is traced outside the caller's precision context, so the precision is set here again.
def _attend_forward(q, k, v, query_real, key_real, *static):
    return jax.vjp(lambda q, k, v: _attend.__wrapped__(q, k, v, query_real, key_real, *static), q, k, v)


def _attend_backward(offset, window, interpret, pull_back, cotangent):
    with jax.default_matmul_precision("float32" if cotangent.dtype == jnp.float32 else "default"):
        return *pull_back(cotangent), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _blocks(size: int, most: int) -> tuple[int, int]:
    """Cover `size` with the fewest and shortest blocks of at most `most`: their total size, and the size of one."""
    count = math.ceil(size / most)
    block = LANES * math.ceil(size / (count * LANES))
    return count * block, block
