"""Reward shaping: what a response's reward becomes before it is compared to others."""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.aggregate import RESPONSE_BUDGET
from lpo_jax.objectives.batch import Context, required
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part


@dataclasses.dataclass(frozen=True)
class Shape(Part):
    """The base."""

    def __call__(self, context: Context) -> jax.Array:
        """New rewards [P,K] from `context.rewards`; what it says of invalid responses is ignored."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Sign(Shape):
    """1 for a response that passed, -1 for one that did not."""

    def __call__(self, context: Context) -> jax.Array:
        return jnp.where(context.passed, 1.0, -1.0)


@dataclasses.dataclass(frozen=True)
class FlawPenalty(Shape):
    """R less a penalty for a response that passed although a judge found a wrong step in it.

    Attributes:
      flaw_penalty: in units of reward. At 1, on rewards of 1 and -1, a flawed success is worth 0: learning turns
        from flawed to clean successes as soon as there are more of the clean ones.

    References:
      FAPO, public code verl-recipe/fapo.
    """

    flaw_penalty: float = 1.0
    reads = (Field.FLAWED,)

    def __call__(self, context: Context) -> jax.Array:
        flawed = context.passed & (required(context.scored.flawed) != 0)
        return context.rewards - self.flaw_penalty * flawed


@dataclasses.dataclass(frozen=True)
class Overlong(Shape):
    """R less a penalty that grows from 0 to 1 over the last stretch before the token limit.

    Attributes:
      overlong_buffer: length of the stretch, as a share of `max_tokens` (the paper: 4096 of 20480).
      max_tokens: the response budget of the run.

    References:
      DAPO, arXiv 2503.14476, equation 13.
    """

    overlong_buffer: float = 0.2
    max_tokens: int = RESPONSE_BUDGET

    def __call__(self, context: Context) -> jax.Array:
        stretch = self.overlong_buffer * self.max_tokens
        return context.rewards - ((context.lengths - self.max_tokens) / stretch + 1).clip(0, 1)


@dataclasses.dataclass(frozen=True)
class ClusterFrequency(Shape):
    """The share of the group that gave the same answer: no verifier, no labels. 0 for a response without an answer.

    Attributes:
      entropy_threshold: nats; a group whose answers have this entropy or more gets 0 throughout, for there is no
        majority to follow.

    References:
      EMPO, arXiv 2504.05812; public code QingyangZhang/EMPO.
    """

    entropy_threshold: float = 1.0
    reads = (Field.CLUSTERS,)

    def __call__(self, context: Context) -> jax.Array:
        share, entropy = agreement(context)
        answered = required(context.scored.clusters) >= 0
        return jnp.where(answered & (entropy < self.entropy_threshold), share, 0)


@dataclasses.dataclass(frozen=True)
class RewardTiers(Shape):
    """1 for a pass, and on top of it how near the reward came to 1, in steps.

    The steps leave out differences that are too small to mean anything, and keep the order: any pass is worth more
    than any failure. UNCERTAIN: reconstructed; the paper's zones are of each task's own distances and its weight
    was not found.

    Attributes:
      tiers: steps that [0, 1] is cut into.
      tier_weight: what the highest step adds.

    References:
      SSL (Sweet Spot Learning), from its abstract and reviews.
    """

    tiers: int = 4
    tier_weight: float = 0.5

    def __call__(self, context: Context) -> jax.Array:
        step = jnp.floor(context.rewards.clip(0, 1) * self.tiers) / self.tiers
        return context.passed + self.tier_weight * step


def agreement(context: Context) -> tuple[jax.Array, jax.Array]:
    """How the answers of a group agree, from `Scored.clusters`.

    Returns:
      share: [P,K] part of the valid responses with this response's answer, itself included. A response without an
        answer agrees with itself only.
      entropy: [P,1] of the answers, in nats.
    """
    clusters = required(context.scored.clusters)
    same = (clusters[..., :, None] == clusters[..., None, :]) & (clusters[..., None] >= 0)
    same = (same | jnp.eye(clusters.shape[-1], dtype=bool)) & context.valid[..., None, :]
    share = jnp.where(context.valid, same.sum(-1) / context.size, 1)
    return share, -jnp.log(share).sum(-1, keepdims=True) / context.size
