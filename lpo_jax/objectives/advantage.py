"""From rewards to utilities u = (R - b) / tau: what a response is compared to, and the temperature."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lpo_jax.objectives.batch import Context, required
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, centred, masked_median
from lpo_jax.objectives.targets import HUGE, TEMPERATURE_FLOOR, temperature


@dataclasses.dataclass(frozen=True)
class AdvantageRule(Part):
    """The base: how rewards become the utilities that a projection works with."""

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        """Utilities [P,K], 0 where invalid, and tau [P,1] in units of reward."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Utility(AdvantageRule):
    """u = (R - mu) / tau: the exponent of the target of a listwise method, which sees differences only.

    Attributes:
      temperature: what tau is, as `temperature` takes it.
      ddof: of the group's standard deviation.
      temperature_floor: least scale.
    """

    temperature: str | float = "grpo"
    ddof: int = 0
    temperature_floor: float = TEMPERATURE_FLOOR

    def difference(self, context: Context) -> jax.Array:
        """R - b [P,K], 0 where invalid."""
        return CENTRES["mean"](context)

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        rewards, valid = context.rewards, context.valid
        tau = temperature(rewards, self.temperature, valid, ddof=self.ddof, floor=self.temperature_floor)
        return scaled(self.difference(context), tau), tau


@dataclasses.dataclass(frozen=True)
class Advantage(Utility):
    """A = (R - b) / tau: what a policy gradient weighs a response by.

    | centre | b | of |
    |---|---|---|
    | "mean" | mean of the group | GRPO |
    | "none" | 0 | REINFORCE |
    | "loo" | mean of the others in the group | RLOO |
    | "median" | median of the group | MC-GRPO |
    | "length" | mean of the group, weighed by length | OPO |
    | "batch" | mean of all responses of the minibatch | REINFORCE++ |
    | "baseline" | `Scored.baseline`, say the greedy response's reward | ReMax |
    | "runner-up" | second best of the group; all but the best get 0 | pass@k GRPO |

    Attributes:
      centre: what b is.
    """

    centre: str = "mean"

    @property
    def needs(self) -> tuple[Field, ...]:
        return (Field.BASELINE,) if self.centre == "baseline" else ()

    def difference(self, context: Context) -> jax.Array:
        return CENTRES[self.centre](context)


@dataclasses.dataclass(frozen=True)
class NonzeroAdvantage(Advantage):
    """`Advantage`, times K / K' where K' of the K advantages are not 0: ties at b do not dilute the step.

    References:
      MC-GRPO, public code lotusroot-kim/MC-GRPO (its GSM8K trainer).
    """

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        u, tau = super().__call__(context)
        share = jnp.maximum((u != 0).sum(-1, keepdims=True), 1) / context.size
        return scaled(u, share), tau * share


def advantages(rewards: ArrayLike, temperature: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """A = (R - mu) / tau [P,K], in units of tau; 0 where invalid, exactly 0 in a group of equal rewards."""
    return scaled(centred(rewards, mask), temperature)


def scaled(difference: jax.Array, tau: ArrayLike) -> jax.Array:
    """`difference` [P,K] in units of tau, kept finite in float32."""
    return (difference / as_float(tau)).clip(-HUGE, HUGE)


def _mean(context: Context) -> jax.Array:
    return centred(context.rewards, context.valid)


def _none(context: Context) -> jax.Array:
    return context.rewards


def _leave_one_out(context: Context) -> jax.Array:
    # R_k - mean of the others = K / (K - 1) (R_k - mean); a response alone in its group has nobody, and gets 0.
    return centred(context.rewards, context.valid) * context.size / jnp.maximum(context.size - 1, 1)


def _median(context: Context) -> jax.Array:
    return jnp.where(context.valid, context.rewards - masked_median(context.rewards, context.valid), 0)


def _length(context: Context) -> jax.Array:
    # From the plain mean, so that a group of equal rewards gives exactly 0.
    deviation = centred(context.rewards, context.valid)
    share = context.lengths / jnp.maximum(context.lengths.sum(-1, keepdims=True), 1)
    return jnp.where(context.valid, deviation - (share * deviation).sum(-1, keepdims=True), 0)


def _batch(context: Context) -> jax.Array:
    return centred(context.rewards.reshape(1, -1), context.valid.reshape(1, -1)).reshape(context.valid.shape)


def _baseline(context: Context) -> jax.Array:
    # A baseline that could not be had (its verifier broke) compares nothing.
    b = as_float(required(context.scored.baseline))
    return jnp.where(context.valid & jnp.isfinite(b), context.rewards - b, 0)


def _runner_up(context: Context) -> jax.Array:
    ordered = jnp.sort(jnp.where(context.valid, context.rewards, -jnp.inf), -1)
    best, second = ordered[..., -1:], ordered[..., max(ordered.shape[-1] - 2, 0), None]
    wins = context.valid & (context.rewards == best) & (context.valid.sum(-1, keepdims=True) > 1)
    return jnp.where(wins, best - second, 0)


# word -> R - b [P,K], 0 where invalid
CENTRES: dict[str, Callable[[Context], jax.Array]] = {
    "mean": _mean,
    "none": _none,
    "loo": _leave_one_out,
    "median": _median,
    "length": _length,
    "batch": _batch,
    "baseline": _baseline,
    "runner-up": _runner_up,
}
