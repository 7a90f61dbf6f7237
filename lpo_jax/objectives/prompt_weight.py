"""Prompt weights: how much a prompt's group counts relative to the others of the minibatch.

`Objective.prompt_weight_inside` decides whether a weight sharpens the target or multiplies the loss.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, Field
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import centred, masked_mean

NFT_WEIGHTS = ("dr-grpo", "grpo")


@dataclasses.dataclass(frozen=True)
class PromptWeight(Part):
    """The base class: a weight lambda of each prompt."""

    def __call__(self, context: Context) -> jax.Array:
        """Return weights [P,1], finite whatever the rewards are."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SignalShare(PromptWeight):
    """N / N', where N' of the N groups have rewards that differ, so that groups without signal do not dilute the step.

    References:
      GPG, arXiv 2504.02546, the factor alpha.
    """

    def __call__(self, context: Context) -> jax.Array:
        count = context.valid.any(-1).sum() / jnp.maximum(_mixed(context).sum(), 1)
        return jnp.broadcast_to(count, context.rewards[:, :1].shape)


@dataclasses.dataclass(frozen=True)
class Difficulty(PromptWeight):
    """N' softmax(-p / t) over the N' groups whose rewards differ, with pass rates p: harder prompts count more.

    A group whose rewards differ although no response passes is treated as one that always passes. Groups of equal
    rewards get weight 1; their advantages are 0.

    Attributes:
      difficulty_temperature: t, in pass rate.

    References:
      MathForge (DGPO's difficulty-aware question weighting), public code AMAP-ML/MathForge.
    """

    difficulty_temperature: float = 2.0

    def __call__(self, context: Context) -> jax.Array:
        mixed = _mixed(context)
        p = jnp.where(context.pass_rate > 0, context.pass_rate, 1)
        # A softmax over nothing is NaN: without a mixed group it is taken over all groups and then masked.
        share = jax.nn.softmax(-p / self.difficulty_temperature, axis=0, where=mixed | ~mixed.any())
        return jnp.where(mixed, mixed.sum() * share, 1)


@dataclasses.dataclass(frozen=True)
class LongerSuccess(PromptWeight):
    """1 if the longest passing response is longer than the mean of the failing ones, `short_weight` otherwise.

    Failing responses that were truncated do not count. If there are no others, one passing response is enough.

    Attributes:
      short_weight: the weight of the other prompts.

    References:
      ADORA, public code ShadeCloak/ADORA (its text variant).
    """

    short_weight: float = 0.1

    def __call__(self, context: Context) -> jax.Array:
        truncated = context.scored.truncated
        failed = context.valid & ~context.passed
        ended = failed if truncated is None else failed & (truncated == 0)
        longest = jnp.where(context.passed, context.lengths, 0).max(-1, keepdims=True)
        mean = masked_mean(context.lengths, ended, -1, keepdims=True)
        return jnp.where(longest > mean, 1.0, self.short_weight)


@dataclasses.dataclass(frozen=True)
class NftWeight(PromptWeight):
    """The weight with which negative-aware fine-tuning is a policy gradient on-policy.

    p is the pass rate of the group, clipped to [0.02, 0.98].

    Attributes:
      nft_weight: "dr-grpo": 1 - p, or "grpo": sqrt((1 - p) / p), named after the method that each equals on-policy.

    References:
      NFT, public code NVlabs/NFT.
    """

    nft_weight: str = "dr-grpo"

    def __call__(self, context: Context) -> jax.Array:
        p = context.pass_rate.clip(0.02, 0.98)
        return 1 - p if self.nft_weight == "dr-grpo" else jnp.sqrt((1 - p) / p)


def _mixed(context: Context) -> jax.Array:
    """Return which groups have rewards that differ, [P,1] bool."""
    return (centred(context.rewards, context.valid) != 0).any(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class HookWeight(PromptWeight):
    """`Scored.weight`, which a hook of the run fills; 1 if it is None."""

    uses = (Field.WEIGHT,)

    def __call__(self, context: Context) -> jax.Array:
        weight = context.scored.weight
        return jnp.ones_like(context.rewards[:, :1]) if weight is None else weight[:, None]
