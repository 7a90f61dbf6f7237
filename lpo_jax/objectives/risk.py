"""RiskPO: a risk-averse advantage of bundles of prompts, relative to tracked quantiles of their scores.

A bundle has five prompts. Bundle score k sums the rewards of the k-th responses of its prompts. Two quantiles of these
scores are tracked over the run. The shortfall of a score below the upper quantile is the advantage of its responses;
the part below the lower quantile has a larger weight.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.advantage import AdvantageRule, scaled
from lpo_jax.objectives.batch import Context, ControlState, Field, Listwise, required
from lpo_jax.objectives.part import Control, Part
from lpo_jax.objectives.simplex import masked_mean, masked_std
from lpo_jax.objectives.targets import HUGE

# A smaller standard deviation is not used as a scale.
LEAST_STD = 1e-3


@dataclasses.dataclass(frozen=True)
class Bundles(Part):
    """The bundles and quantile levels that the advantage and the tracked quantiles of RiskPO share.

    Attributes:
      bundle_size: number of prompts in a bundle, consecutive in the minibatch; the last bundle may have fewer.
      quantile_low, quantile_high: levels of the two quantiles.
    """

    bundle_size: int = 5
    quantile_low: float = 0.2
    quantile_high: float = 0.8

    def __post_init__(self) -> None:
        if not self.quantile_low < self.quantile_high:
            raise ValueError(
                f"quantile_low must be less than quantile_high, got {self.quantile_low:g} and {self.quantile_high:g}"
            )

    def scores(self, context: Context) -> tuple[jax.Array, jax.Array]:
        """Return the bundle scores [bundles, K], and which of them have a response.

        A missing response counts with the mean reward of the others in its score.
        """
        P, K = context.valid.shape
        short = -P % self.bundle_size
        rewards, valid = (
            jnp.pad(x, ((0, short), (0, 0))).reshape(-1, self.bundle_size, K)
            for x in (context.rewards, context.valid)
        )
        return self.bundle_size * masked_mean(rewards, valid, 1), valid.any(1)

    def quantiles(self, scores: jax.Array, there: jax.Array) -> jax.Array:
        """Return the two quantiles [2] of the scores of one minibatch, linearly interpolated; 0 without scores."""
        ordered = jnp.where(there.any(), jnp.sort(jnp.where(there, scores, jnp.inf).ravel()), 0)
        last = jnp.maximum(there.sum() - 1, 0)
        place = jnp.array([self.quantile_low, self.quantile_high]) * last
        left = jnp.floor(place).astype(int)
        lower, upper = ordered[left], ordered[jnp.minimum(left + 1, last)]
        return lower + (place - left) * (upper - lower)


@dataclasses.dataclass(frozen=True)
class Quantiles(Bundles, Control):
    """The tracked quantiles: those of the first minibatch, then q + rate (level - share of scores below q).

    This is stochastic gradient descent on the pinball loss, so q converges to where the share equals the level.

    Attributes:
      quantile_rate: step size, in units of reward.

    References:
      RiskPO, public code RTkenny/RiskPO.
    """

    quantile_rate: float = 0.1

    def init(self) -> ControlState:
        return {"quantiles": jnp.zeros(2), "started": jnp.zeros((), bool)}

    def update(self, state: ControlState, context: Context, view: Listwise) -> ControlState:
        scores, there = self.scores(context)
        levels = jnp.array([self.quantile_low, self.quantile_high])
        below = masked_mean(scores < state["quantiles"][:, None, None], there[None], (1, 2))
        moved = state["quantiles"] + self.quantile_rate * (levels - below)
        q = jnp.where(state["started"], moved, self.quantiles(scores, there))
        return {
            "quantiles": jnp.where(there.any(), q, state["quantiles"]).astype(state["quantiles"].dtype),
            "started": state["started"] | there.any(),
        }


@dataclasses.dataclass(frozen=True)
class RiskAdvantage(Bundles, AdvantageRule):
    """Mixed value at risk: (w CVaR + RVaR) / (w + 1) of a bundle score S, over the deviations of bundle and group.

    RVaR = (clip(S, q_low, q_high) - q_high) / (level_high - level_low) is the shortfall of S below q_high, down to
    q_low; CVaR = -max(q_low - S, 0) / level_low is its shortfall below q_low.

    Attributes:
      tail_weight: w.

    References:
      RiskPO, public code RTkenny/RiskPO (its MATH setting: tracked quantiles, natural baseline, credit "std").
    """

    tail_weight: float = 1.5
    reads = (Field.CONTROL,)

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        scores, there = self.scores(context)
        state = required(context.scored.control)
        low, high = jnp.where(state["started"], state["quantiles"], self.quantiles(scores, there))
        lack = jnp.maximum(low - scores, 0)
        between = jnp.clip(scores, low, high) - high
        value = between / (self.quantile_high - self.quantile_low)
        value = (value - self.tail_weight * lack / self.quantile_low) / (self.tail_weight + 1)
        bundle = jnp.arange(context.valid.shape[0]) // self.bundle_size
        tau = jnp.minimum(_scale(scores, there)[bundle] * _scale(context.rewards, context.valid), HUGE)
        return jnp.where(context.valid, scaled(value[bundle], tau), 0), tau


def _scale(x: jax.Array, mask: jax.Array) -> jax.Array:
    std = masked_std(x, mask, ddof=1)
    return jnp.where(std > LEAST_STD, std, 1)
