"""Inputs of a probe: hidden states and entropies of a round, and the confidence in its prompts.

Axes: P prompts · K responses · S prompt tokens · T response tokens · D width · rows B, p, k, X as in `packing.py`.
"""

import functools

import jax
import jax.numpy as jnp

from lpo_jax.models import decoder
from lpo_jax.models.head import token_log_probs
from lpo_jax.models.packing import take
from lpo_jax.models.runner import Groups, ModelRunner, over_microbatches
from lpo_jax.parallel.sharding import whole

LAST = 8  # tokens whose states are averaged
LEAST_LIKELY = 0.2  # share of a prompt's tokens that determine its confidence (ProGRPO)


@functools.partial(jax.jit, static_argnums=0)
def round_features(
    runner: ModelRunner, params: decoder.Params, groups: Groups, mask: jax.Array
) -> dict[str, jax.Array]:
    """Compute features and prompt confidence of a batch in one forward pass.

    Args:
      mask: `[P, K, T]` marks response tokens.

    Returns:
      features: `[P, K, 2 D + 4]`: the mean state of the last prompt tokens (equal for its K responses), that of the
        last response tokens, and the mean, maximum, first and last of the response's token entropies.
      prompt_confidence: `[P]` exp of the mean log-prob of the prompt's least likely tokens, at the sampling
        temperature, like the confidence in responses that it is compared with.
    """
    unembed = decoder.unembedding(params)
    S, T = groups.prompts.shape[1], mask.shape[-1]
    count, steps = mask.sum(-1, keepdims=True), jnp.arange(T)
    last = mask & (steps >= count - LAST)
    weight = last / jnp.maximum(last.sum(-1, keepdims=True), 1)  # [P, K, T]

    def chunk(xs):
        rows, weight, prompts = xs  # prompts [B, p, S]
        B, p = rows.lengths.shape
        hidden = runner.hidden(params, rows, outputs)
        states = rows.predicting(hidden)
        head = states, unembed, rows.targets, runner.temperature
        entropy = token_log_probs(*head, never=runner.config.never_sampled)["entropy"]
        place = rows.place[:, None] // rows.response_size
        response = jnp.arange(p * rows.num_responses)[:, None] == place  # [B, p k, X]
        own = _sum(jnp.where(response, weight[:, None], 0), states).reshape(B, p, rows.num_responses, -1)
        padded = hidden if rows.unpack is None else jax.vmap(take)(hidden, rows.unpack)
        of_prompt = padded.reshape(B, p, -1, hidden.shape[-1])[:, :, :S]
        at, length = jnp.arange(S), rows.lengths[..., None]
        near = (at < length) & (at >= length - LAST)
        prompt = _sum((near / near.sum(-1, keepdims=True))[..., None, :], of_prompt)  # [B, p, 1, D]
        # Token i of a prompt predicts its token i + 1.
        predicting, ids = of_prompt[:, :, :-1].reshape(B, p * (S - 1), -1), prompts[:, :, 1:].reshape(B, -1)
        logp = token_log_probs(predicting, unembed, ids, runner.temperature)["logp"].reshape(B, p, S - 1)
        sure = _least_likely(logp, at[1:] < length)
        return (
            entropy,
            own,
            jnp.broadcast_to(prompt, own.shape),
            jnp.broadcast_to(sure[..., None], own.shape[:-1]),
        )

    layout, rows = runner.rows(groups)
    outputs = runner.image_outputs(params, groups)
    xs = rows, layout.to_rows(weight), take(groups.prompts, layout.prompt)
    entropy, *of_response = over_microbatches(chunk, xs, layout.count)
    own, prompt, sure = (layout.responses_from_rows(x) for x in of_response)
    entropy = jnp.where(mask, layout.from_rows(entropy), 0)
    ends = jnp.take_along_axis(entropy, jnp.maximum(count - 1, 0), axis=-1)[..., 0]
    mean = entropy.sum(-1) / jnp.maximum(count[..., 0], 1)
    summary = jnp.stack([mean, entropy.max(-1), entropy[..., 0], ends], -1)
    features = jnp.concatenate([prompt, own, summary], axis=-1)
    return whole({"features": features, "prompt_confidence": sure[:, 0]})


def _sum(weight: jax.Array, states: jax.Array) -> jax.Array:
    """Weighted sums `[..., W, D]` of states `[..., X, D]` by weights `[..., W, X]`, in float32."""
    return jnp.einsum("...wx,...xd->...wd", weight, states.astype(jnp.float32), precision="highest")


def _least_likely(logp: jax.Array, real: jax.Array) -> jax.Array:
    """exp of the mean of the lowest fifth of `logp` [B, p, S - 1]; 1 for a prompt of one token."""
    count = jnp.ceil(LEAST_LIKELY * real.sum(-1, keepdims=True))
    ordered = jnp.sort(jnp.where(real, logp, jnp.inf), axis=-1)
    chosen = jnp.arange(logp.shape[-1]) < count
    return jnp.exp(jnp.where(chosen, ordered, 0).sum(-1) / jnp.maximum(count[..., 0], 1))
