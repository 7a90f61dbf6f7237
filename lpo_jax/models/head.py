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
    hidden: jax.Array, unembed: jax.Array, targets: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each target under softmax(logits / temperature), and that distribution's entropy.

    Chunks of tokens run one after another and are rematerialised in the backward pass, so peak memory is one
    chunk of logits in either direction.

    Args:
      hidden: `[R, D]` normed states, each predicting the target of its row.
      unembed: `[V, D]`.
      targets: `[R]` ids.
      temperature: the one the sampler used; scores are of the distribution that was sampled from.

    Returns:
      log-prob `[R]` and entropy in nats `[R]`, both float32.
    """
    R, D = hidden.shape
    C = min(chunk_size(unembed.shape[0]), R)
    pad = -R % C

    @jax.checkpoint
    def chunk(xs):
        h, target = xs
        logits = project(h, unembed) / temperature  # [C, V]
        lse = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        entropy = lse - jnp.sum(jnp.exp(logits - lse[:, None]) * logits, axis=-1)
        return chosen - lse, entropy

    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, C, D)
    targets = jnp.pad(targets, (0, pad)).reshape(-1, C)
    with jax.named_scope("token_log_probs"):
        logp, entropy = jax.lax.map(chunk, (hidden, targets))
    return logp.reshape(-1)[:R], entropy.reshape(-1)[:R]
