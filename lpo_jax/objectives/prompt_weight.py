"""Prompt weights: how much a prompt's group counts beside the others of the minibatch.

`Objective.prompt_weight_inside` says whether a weight sharpens the target or multiplies the loss.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import centred, masked_mean

NFT_WEIGHTS = ("dr-grpo", "grpo")


@dataclasses.dataclass(frozen=True)
class PromptWeight(Part):
    """The base: lambda of each prompt."""

    def __call__(self, context: Context) -> jax.Array:
        """Weights [P,1], finite whatever the rewards."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SignalShare(PromptWeight):
    """N / N', N' of the N groups having rewards that differ: groups without signal do not dilute the step.

    References:
      GPG, arXiv 2504.02546, the factor alpha.
    """

    def __call__(self, context: Context) -> jax.Array:
        count = context.valid.any(-1).sum() / jnp.maximum(_mixed(context).sum(), 1)
        return jnp.broadcast_to(count, context.rewards[:, :1].shape)


@dataclasses.dataclass(frozen=True)
class Difficulty(PromptWeight):
    """N' softmax(-p / t) over the N' groups whose rewards differ, p their pass rates: harder prompts count more.

    A group that got its rewards without a single pass counts as one that always passes. Groups of equal rewards
    weigh 1; they have no advantage.

    Attributes:
      difficulty_temperature: t, in pass rate.

    References:
      MathForge (DGPO's difficulty-aware question weighting), public code AMAP-ML/MathForge.
    """

    difficulty_temperature: float = 2.0

    def __call__(self, context: Context) -> jax.Array:
        mixed = _mixed(context)
        p = jnp.where(context.pass_rate > 0, context.pass_rate, 1)
        # A softmax over nothing is NaN: without a mixed group it is taken over all, and hidden.
        share = jax.nn.softmax(-p / self.difficulty_temperature, axis=0, where=mixed | ~mixed.any())
        return jnp.where(mixed, mixed.sum() * share, 1)


@dataclasses.dataclass(frozen=True)
class LongerSuccess(PromptWeight):
    """1 where the longest response that passed is longer than the mean of those that failed, less elsewhere.

    Failures that were cut at the token limit do not count; without any other, a single pass is enough.

    Attributes:
      short_weight: what "less" is.

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
    """What makes negative-aware fine-tuning a policy gradient on-policy, p the pass rate within [0.02, 0.98].

    Attributes:
      nft_weight: "dr-grpo": 1 - p, "grpo": sqrt((1 - p) / p). Named after what they equal on-policy.

    References:
      NFT, public code NVlabs/NFT.
    """

    nft_weight: str = "dr-grpo"

    def __call__(self, context: Context) -> jax.Array:
        p = context.pass_rate.clip(0.02, 0.98)
        return 1 - p if self.nft_weight == "dr-grpo" else jnp.sqrt((1 - p) / p)


def _mixed(context: Context) -> jax.Array:
    """[P,1] the groups whose rewards differ."""
    return (centred(context.rewards, context.valid) != 0).any(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class HookWeight(PromptWeight):
    """What a hook of the run gives as `Scored.weight`; 1 where it gives none."""

    uses = (Field.WEIGHT,)

    def __call__(self, context: Context) -> jax.Array:
        weight = context.scored.weight
        return jnp.ones_like(context.rewards[:, :1]) if weight is None else weight[:, None]
