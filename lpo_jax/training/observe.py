"""What a probe may look at: hidden states and entropies of a round, and the confidence in its prompts.

Axes: P prompts · K responses · S prompt tokens · T response tokens · D width · F features.
"""

import functools

import jax
import jax.numpy as jnp

from lpo_jax.models import decoder
from lpo_jax.models.head import token_log_probs
from lpo_jax.training.batch import Groups
from lpo_jax.training.step import Program

LAST = 8  # tokens whose states are averaged
LEAST_LIKELY = 0.2  # share of a prompt's tokens that its confidence is taken over (ProGRPO)


@functools.partial(jax.jit, static_argnums=0)
def observed(
    program: Program, params: decoder.Params, groups: Groups, mask: jax.Array
) -> dict[str, jax.Array]:
    """Features and prompt confidence of a batch, from one forward pass.

    Args:
      mask: `[P, K, T]` response tokens.

    Returns:
      features: `[P, K, 2 D + 4]`: the mean state of the last prompt tokens, that of the last response tokens, and the
        mean, maximum, first and last of the response's token entropies. The prompt's come first, equal for its K.
      prompt_confidence: `[P]` exp of the mean log-prob of the prompt's least likely tokens.
    """
    # Microbatches hold whole groups only when they fit, so per-prompt results are made per response and averaged.
    unembed = decoder.unembedding(params)

    def piece(xs):
        groups, mask = xs
        P, K, T = groups.responses.shape
        S = groups.prompts.shape[1]
        states, prompt_states = program.predicting(params, groups)
        at, length = jnp.arange(S), groups.lengths[:, None]
        prompt = _mean(prompt_states, (at < length) & (at >= length - LAST))  # [P, D]
        count = mask.sum(-1, keepdims=True)
        steps = jnp.arange(T)
        own = _mean(states, mask & (steps >= count - LAST))  # [P, K, D]
        rows = states.reshape(P * K * T, -1)
        entropy = token_log_probs(rows, unembed, groups.responses.reshape(-1), program.temperature)["entropy"]
        entropy = jnp.where(mask, entropy.reshape(P, K, T), 0)
        last = jnp.take_along_axis(entropy, jnp.maximum(count - 1, 0), axis=-1)[..., 0]
        summary = [entropy.sum(-1) / jnp.maximum(count[..., 0], 1), entropy.max(-1), entropy[..., 0], last]
        features = jnp.concatenate(
            [jnp.broadcast_to(prompt[:, None], (P, K, prompt.shape[-1])), own, jnp.stack(summary, -1)],
            axis=-1,
        )
        # Token i + 1 of a prompt is predicted by its token i.
        logp = token_log_probs(
            prompt_states[:, :-1].reshape(P * (S - 1), -1), unembed, groups.prompts[:, 1:].reshape(-1)
        )["logp"].reshape(P, S - 1)
        confidence = _least_likely(logp, at[1:] < length)
        return {"features": features, "prompt_confidence": jnp.broadcast_to(confidence[:, None], (P, K))}

    cut = program.plan(groups)
    pieces = jax.lax.map(piece, (cut.split_groups(groups), cut.split(mask)))
    out = jax.tree.map(lambda x: cut.join(x, groups.responses.shape[1]), pieces)
    return out | {"prompt_confidence": out["prompt_confidence"][:, 0]}


def _mean(states: jax.Array, keep: jax.Array) -> jax.Array:
    """Mean over the second to last axis where `keep`, in float32."""
    kept = jnp.where(keep[..., None], states.astype(jnp.float32), 0)
    return kept.sum(-2) / jnp.maximum(keep.sum(-1, keepdims=True), 1)


def _least_likely(logp: jax.Array, real: jax.Array) -> jax.Array:
    """exp of the mean of the lowest fifth of `logp` [P, S - 1]; 1 for a prompt of one token."""
    count = jnp.ceil(LEAST_LIKELY * real.sum(-1, keepdims=True))
    ordered = jnp.sort(jnp.where(real, logp, jnp.inf), axis=-1)
    chosen = jnp.arange(logp.shape[-1]) < count
    return jnp.exp(jnp.where(chosen, ordered, 0).sum(-1) / jnp.maximum(count[:, 0], 1))
