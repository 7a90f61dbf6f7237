"""From hidden states to log-probs of given tokens, without ever holding `[tokens, V]`.

Axes: R tokens (any flattened rows) · D width · V vocabulary · C tokens of a chunk (this file only).
"""

import jax
import jax.numpy as jnp

from lpo_jax.models.decoder import project

# Logits of one chunk, in elements: 2^25 float32 values are 128 MiB, whatever the vocabulary.
CHUNK_ELEMENTS = 1 << 25


def chunk_size(vocab_size: int) -> int:
    """Tokens whose logits exist at once: a power of two, at least 16."""
    return max(16, 1 << ((CHUNK_ELEMENTS // vocab_size).bit_length() - 1))


def token_log_probs(
    hidden: jax.Array,
    unembed: jax.Array,
    targets: jax.Array,
    temperature: float = 1.0,
    *,
    top_ids: jax.Array | None = None,
    collision: bool = False,
) -> dict[str, jax.Array]:
    """What softmax(logits / temperature) says of each target, differentiable.

    Chunks of tokens run one after another and are rematerialised in the backward pass, so peak memory is one
    chunk of logits in either direction.

    Args:
      hidden: `[R, D]` normed states, each predicting the target of its row.
      unembed: `[V, D]`.
      targets: `[R]` ids.
      temperature: the one the sampler used; scores are of the distribution that was sampled from.
      top_ids: `[R, J]` ids whose log-probs are wanted too.
      collision: whether the sum of squared probabilities is wanted too.

    Returns:
      Float32 arrays: "logp" `[R]`, "entropy" in nats `[R]`, and as asked "top_logp" `[R, J]`, "collision" `[R]`.
    """

    @jax.checkpoint
    def chunk(xs):
        h, target, top = xs
        logits = project(h, unembed) / temperature  # [C, V]
        lse = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        entropy = lse - jnp.sum(jnp.exp(logits - lse[:, None]) * logits, axis=-1)
        out = {"logp": chosen - lse, "entropy": entropy}
        if top is not None:
            out["top_logp"] = jnp.take_along_axis(logits, top, axis=-1) - lse[:, None]
        if collision:
            out["collision"] = jnp.exp(2 * (logits - lse[:, None])).sum(-1)
        return out

    with jax.named_scope("token_log_probs"):
        return _by_chunks(chunk, unembed.shape[0], hidden, targets, top_ids)


def top_tokens(
    hidden: jax.Array, unembed: jax.Array, count: int, temperature: float = 1.0
) -> dict[str, jax.Array]:
    """The likeliest next tokens: "ids" `[R, J]` int32, their "logp" `[R, J]`, and the "entropy" `[R]` of the whole."""

    def chunk(xs):
        logits = project(xs[0], unembed) / temperature
        lse = jax.nn.logsumexp(logits, axis=-1)
        top, ids = jax.lax.top_k(logits, count)
        entropy = lse - jnp.sum(jnp.exp(logits - lse[:, None]) * logits, axis=-1)
        return {"ids": ids, "logp": top - lse[:, None], "entropy": entropy}

    with jax.named_scope("top_tokens"):
        return _by_chunks(chunk, unembed.shape[0], hidden)


def _by_chunks(function, vocab_size: int, *arrays: jax.Array | None):
    """`function` over chunks of the rows `[R, ...]`; outputs are joined and cut back to R rows."""
    R = arrays[0].shape[0]
    C = min(chunk_size(vocab_size), R)
    cut = lambda x: jnp.pad(x, [(0, -R % C)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, C, *x.shape[1:])  # noqa: E731
    out = jax.lax.map(function, jax.tree.map(cut, arrays))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:R], out)
