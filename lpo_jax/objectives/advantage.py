"""From rewards to utilities u = (R - b) / tau: the baseline b and the temperature tau."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lpo_jax.objectives.batch import Context, Field, required
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, centred, masked_mean, masked_median
from lpo_jax.objectives.targets import HUGE, TEMPERATURE_FLOOR, target_log_probs, temperature


@dataclasses.dataclass(frozen=True)
class AdvantageRule(Part):
    """The base class: computes the utilities of a projection from rewards."""

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        """Return utilities [P,K], 0 where invalid, and tau [P,1] in units of reward."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Utility(AdvantageRule):
    """u = (R - mu) / tau: the logits of a listwise method's target, which depends on differences only.

    Attributes:
      temperature: the rule for tau, see `temperature`.
      ddof: degrees of freedom subtracted in the group's standard deviation.
      temperature_floor: lower bound of the scale.
    """

    temperature: str | float = "grpo"
    ddof: int = 0
    temperature_floor: float = TEMPERATURE_FLOOR

    def difference(self, context: Context) -> jax.Array:
        """Return R - b [P,K], 0 where invalid."""
        return CENTRES["mean"](context)

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        rewards, valid = context.rewards, context.valid
        tau = temperature(rewards, self.temperature, valid, ddof=self.ddof, floor=self.temperature_floor)
        return scaled(self.difference(context), tau), tau


@dataclasses.dataclass(frozen=True)
class Advantage(Utility):
    """A = (R - b) / tau: the advantage of a policy gradient.

    | centre | b | used by |
    |---|---|---|
    | "mean" | mean of the group | GRPO |
    | "none" | 0 | REINFORCE |
    | "loo" | mean of the other responses of the group | RLOO |
    | "median" | median of the group | MC-GRPO |
    | "length" | mean of the group, weighted by length | OPO |
    | "batch" | mean of all responses of the minibatch | REINFORCE++ |
    | "baseline" | `Scored.baseline`, such as the reward of a greedy response | ReMax |
    | "runner-up" | second best reward of the group; all responses but the best get 0 | pass@k GRPO |

    Attributes:
      centre: the baseline b.
    """

    centre: str = "mean"

    @property
    def needs(self) -> tuple[Field, ...]:
        return (Field.BASELINE,) if self.centre == "baseline" else ()

    def difference(self, context: Context) -> jax.Array:
        return CENTRES[self.centre](context)


@dataclasses.dataclass(frozen=True)
class NonzeroAdvantage(Advantage):
    """`Advantage` times K / K', where K' of the K advantages are not 0, so that ties at b do not dilute the step.

    References:
      MC-GRPO, public code lotusroot-kim/MC-GRPO (its GSM8K trainer).
    """

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        u, tau = super().__call__(context)
        share = jnp.maximum((u != 0).sum(-1, keepdims=True), 1) / context.size
        return scaled(u, share), tau * share


def advantages(rewards: ArrayLike, temperature: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Return A = (R - mu) / tau [P,K]: 0 where invalid, exactly 0 in a group of equal rewards.

    Args:
      rewards: [P,K].
      temperature: tau, a number or [P,1], in units of reward.
      mask: [P,K] the valid responses; None means all.
    """
    return scaled(centred(rewards, mask), temperature)


def scaled(difference: jax.Array, tau: ArrayLike) -> jax.Array:
    """Return `difference` [P,K] in units of tau, clipped to finite float32 values."""
    return (difference / as_float(tau)).clip(-HUGE, HUGE)


def _mean(context: Context) -> jax.Array:
    return centred(context.rewards, context.valid)


def _none(context: Context) -> jax.Array:
    return context.rewards


def _leave_one_out(context: Context) -> jax.Array:
    # R_k - mean of the others = K / (K - 1) (R_k - mean); the only response of a group gets 0.
    return centred(context.rewards, context.valid) * context.size / jnp.maximum(context.size - 1, 1)


def _median(context: Context) -> jax.Array:
    return jnp.where(context.valid, context.rewards - masked_median(context.rewards, context.valid), 0)


def _length(context: Context) -> jax.Array:
    # Computed from differences to the plain mean, so that equal rewards give exactly 0.
    deviation = centred(context.rewards, context.valid)
    share = context.lengths / jnp.maximum(context.lengths.sum(-1, keepdims=True), 1)
    return jnp.where(context.valid, deviation - (share * deviation).sum(-1, keepdims=True), 0)


def _batch(context: Context) -> jax.Array:
    return centred(context.rewards.reshape(1, -1), context.valid.reshape(1, -1)).reshape(context.valid.shape)


def _baseline(context: Context) -> jax.Array:
    # A baseline that is not finite, because its verifier failed, gives 0.
    b = as_float(required(context.scored.baseline))
    return jnp.where(context.valid & jnp.isfinite(b), context.rewards - b, 0)


def _runner_up(context: Context) -> jax.Array:
    ordered = jnp.sort(jnp.where(context.valid, context.rewards, -jnp.inf), -1)
    best, second = ordered[..., -1:], ordered[..., max(ordered.shape[-1] - 2, 0), None]
    wins = context.valid & (context.rewards == best) & (context.valid.sum(-1, keepdims=True) > 1)
    return jnp.where(wins, best - second, 0)


# name -> R - b [P,K], 0 where invalid
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


# Halvings of a range of temperatures as wide as float32 allows.
_HALVINGS = 60


@dataclasses.dataclass(frozen=True)
class DualUtility(AdvantageRule):
    """u = (R - mu) / eta, with the eta >= 1e-6 at which the mean of KL(softmax(R / eta) || uniform) is the budget.

    It is one temperature for the whole minibatch (MPO). This eta minimises
    eta epsilon + eta mean log mean_k exp(R_k / eta), the convex dual of maximising the reward within a KL of epsilon of
    the behaviour policy. Groups of equal rewards are left out of the mean, because their target is uniform at every
    eta. If even the targets that keep only the best responses stay within the budget, eta is 1e-6.

    Attributes:
      kl_budget: epsilon, in nats.

    References:
      MPO, arXiv 1806.06920, equation 8 (its E-step); REPS (Peters, Mülling and Altun, 2010).
    """

    kl_budget: float = 0.1

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        difference = centred(context.rewards, context.valid)
        mixed = (difference != 0).any(-1)

        def divergence(log_eta: jax.Array) -> jax.Array:
            log_w = target_log_probs(difference, jnp.exp(log_eta), mask=context.valid)
            terms = jnp.exp(log_w) * jnp.where(context.valid, log_w + jnp.log(context.size), 0)
            return masked_mean(terms.sum(-1), mixed)

        def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = interval
            middle = (low + high) / 2
            far = divergence(middle) > self.kl_budget
            return jnp.where(far, middle, low), jnp.where(far, high, middle)

        # The KL of a target is at most (range / eta)^2 / 8 (Hoeffding), and the range twice the largest |R - mu|.
        enough = 2 * jnp.abs(difference).max(initial=0) / (8 * self.kl_budget) ** 0.5
        floor = jnp.log(jnp.asarray(TEMPERATURE_FLOOR, difference.dtype))
        ends = floor, jnp.maximum(jnp.log(jnp.maximum(enough, TEMPERATURE_FLOOR)), floor)
        _, log_eta = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
        eta = jnp.full_like(difference[:, :1], jnp.exp(log_eta))
        return scaled(difference, eta), eta
