"""Biases: changes of the advantages that do not come from the reward of the response itself."""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, required
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.shaping import agreement
from lpo_jax.objectives.simplex import as_float, masked_mean, masked_std


@dataclasses.dataclass(frozen=True)
class Bias(Part):
    """The base class."""

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        """Return new utilities [P,K] from utilities [P,K]; values of invalid responses are ignored."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ConfidenceGap(Bias):
    """u + a (c(q) - c(o)) in groups with a passing response: confident responses gain less.

    c(o) = exp(mean log-prob of the least likely tokens of the response) under the behaviour policy. c(q) is the same
    quantity of the prompt, `Scored.prompt_confidence`.

    Attributes:
      confidence_weight: a. UNCERTAIN: the paper's value was not found; the default is ours.
      unlikely_share: the share of a response's tokens that counts as least likely.

    References:
      ProGRPO, arXiv 2602.05281, advantage re-weighting, as third-party notes quote it.
    """

    confidence_weight: float = 0.3
    unlikely_share: float = 0.2
    reads = (Field.PROMPT_CONFIDENCE,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        logp = as_float(context.scored.behaviour_logp)
        ordered = jnp.sort(jnp.where(context.tokens, logp, jnp.inf), -1)
        few = jnp.ceil(self.unlikely_share * context.lengths)[..., None]
        confidence = jnp.exp(masked_mean(ordered, jnp.arange(logp.shape[-1]) < few, -1))
        gap = as_float(required(context.scored.prompt_confidence))[:, None] - confidence
        return u + jnp.where(context.pass_rate > 0, self.confidence_weight * gap, 0)


@dataclasses.dataclass(frozen=True)
class GlobalMix(Bias):
    """w u + (1 - w) g: if the answers of a group agree, the prompt is compared with the other prompts instead.

    g = (mu - mean of mu) / (standard deviation of mu) over the groups of the minibatch, and
    w = sigmoid(slope (H - middle)), where H is the entropy of the group's answers. So a group whose responses all fail
    or all pass in the same way still has a signal. UNCERTAIN: the paper's w was not found; this form and its numbers
    are ours.

    Attributes:
      mix_slope: in 1/nats.
      mix_entropy: the middle, in nats.

    References:
      COPO, arXiv 2508.04138, as third-party notes quote it.
    """

    mix_slope: float = 3.0
    mix_entropy: float = 1.0
    reads = (Field.CLUSTERS,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        mu = masked_mean(context.rewards, context.valid, -1, keepdims=True).T  # [1,P]
        sampled = context.valid.any(-1)[None]
        sigma = masked_std(mu, sampled)
        g = jnp.where(sampled, mu - masked_mean(mu, sampled), 0) / jnp.where(sigma > 0, sigma, 1)
        w = jax.nn.sigmoid(self.mix_slope * (agreement(context)[1] - self.mix_entropy))
        return w * u + (1 - w) * g.T
