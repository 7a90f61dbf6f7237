"""From rewards to utilities u = (R - b) / tau: the baseline b, the temperature tau, and the credit of tokens."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lpo_jax.objectives.batch import Context, Field, required
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, centred, masked_mean, masked_median, masked_std
from lpo_jax.objectives.targets import HUGE, TEMPERATURE_FLOOR, target_log_probs, temperature
from lpo_jax.objectives.weights import RESPONSE_BUDGET


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


BUDGET_WEIGHTS = ("linear", "uniform", "last")


@dataclasses.dataclass(frozen=True)
class Credit(Part):
    """The base class: utilities of tokens, for methods that know more about a response than its reward."""

    def __call__(self, context: Context, u: jax.Array, tau: jax.Array) -> jax.Array:
        """Return utilities [P,K,T] of the tokens, or [P,K,1] if all tokens of a response have the same.

        Args:
          context: the minibatch.
          u: [P,K] utilities of the responses.
          tau: [P,1] the temperature that they were divided by, in units of reward.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class EntropyCost(Credit):
    """u - beta H, where H is the mean entropy of a response; 0 if H exceeds a limit.

    Attributes:
      entropy_cost: beta.
      entropy_limit: upper limit of H, in nats per token. The paper has ln 2, its code 0.7.

    References:
      GTPO, public code winstonsmith1897/GTPO.
    """

    entropy_cost: float = 0.1
    entropy_limit: float = 0.7
    reads = (Field.ENTROPY,)

    def __call__(self, context: Context, u: jax.Array, tau: jax.Array) -> jax.Array:
        entropy = masked_mean(required(context.stats.entropy), context.tokens, -1)
        return jnp.where(entropy <= self.entropy_limit, u - self.entropy_cost * entropy, 0)[..., None]


@dataclasses.dataclass(frozen=True)
class Progress(Credit):
    """u plus the gain in the probability of the right answer over a token's segment.

    `Scored.credit` holds this gain, see `PrefixValues`. It is standardised over all tokens of the group.

    Attributes:
      progress_weight: what a gain of one standard deviation adds to u.

    References:
      GRPO-VPS. How the gain and the advantage are combined was not found: RECONSTRUCTED.
    """

    progress_weight: float = 1.0
    reads = (Field.CREDIT,)

    def __call__(self, context: Context, u: jax.Array, tau: jax.Array) -> jax.Array:
        progress = _standardised(required(context.scored.credit), context.tokens)
        return u[..., None] + self.progress_weight * progress


@dataclasses.dataclass(frozen=True)
class StepPenalty(Credit):
    """u minus a penalty on the tokens of wrong steps, standardised over the tokens of the group.

    `Scored.credit` is 1 on the tokens of wrong steps.

    Attributes:
      step_penalty: in units of u before it is standardised.

    References:
      CAPO (credit). The order of penalty and normalisation is RECONSTRUCTED.
    """

    step_penalty: float = 1.0
    reads = (Field.CREDIT,)

    def __call__(self, context: Context, u: jax.Array, tau: jax.Array) -> jax.Array:
        penalty = self.step_penalty * as_float(required(context.scored.credit))
        return _standardised(u[..., None] - penalty, context.tokens)


@dataclasses.dataclass(frozen=True)
class AnytimeReturns(Credit):
    """The advantage of each segment of a response under several token budgets, each with an answer at its end.

    A response is cut after 1/S, 2/S, ... of `max_tokens`; token t is in segment s = min(t S // max_tokens, S - 1). On
    the tokens of segment s, `Scored.credit` holds the mean reward r_s of answers given at the end of this segment. If
    the response ended earlier, r_s is its own reward. With weights w of the budgets,

        return_s = sum_{s' >= s} w_s' r_s'        A_s = (return_s - (s V1 + (S - s) V2) / S) / tau

    V2 is the mean return of the group. V1 is a weighted mean of the earlier r of the response, in which each value
    counts twice as much as the one before it, times the weight of the remaining budgets.

    Attributes:
      budgets: S, the number of budgets.
      budget_weights: "linear" (proportional to the budget), "uniform", or "last" (the full budget only).
      max_tokens: the response budget of the run; `lpo train` sets it unless the config does.

    References:
      AnytimeReasoner (BRPO), arXiv 2505.13438; public code sail-sg/AnytimeReasoner.
    """

    budgets: int = 4
    budget_weights: str = "linear"
    max_tokens: int = RESPONSE_BUDGET
    reads = (Field.CREDIT,)

    def weights(self) -> jax.Array:
        """Return w [S], which sums to 1."""
        S = self.budgets
        lengths = {"linear": range(1, S + 1), "uniform": [1] * S, "last": [0] * (S - 1) + [1]}
        w = jnp.asarray(lengths[self.budget_weights], float)
        return w / w.sum()

    def __call__(self, context: Context, u: jax.Array, tau: jax.Array) -> jax.Array:
        S, T = self.budgets, context.tokens.shape[-1]
        segment = jnp.minimum(jnp.arange(T) * S // self.max_tokens, S - 1)
        inside = context.tokens[..., None] & (segment[:, None] == jnp.arange(S))  # [P,K,T,S]
        credit = jnp.broadcast_to(as_float(required(context.scored.credit))[..., None], inside.shape)
        r = masked_mean(credit, inside, 2)  # [P,K,S]
        r = jnp.where(inside.any(2), r, context.rewards[..., None])
        w = self.weights().astype(r.dtype)
        returns = _sum_from(w * r)
        s = jnp.arange(S)
        twice = 2.0**s
        # Over earlier segments: the first segment has none, and its V1 has weight 0.
        earlier = jnp.cumsum(twice * r, -1) / jnp.cumsum(twice)
        V1 = jnp.pad(earlier[..., :-1], ((0, 0), (0, 0), (1, 0))) * _sum_from(w)
        V2 = masked_mean(returns, context.valid[..., None], 1, keepdims=True)
        A = returns - (s * V1 + (S - s) * V2) / S
        return scaled(jnp.where(context.valid[..., None], A, 0), tau[..., None])[..., segment]


def _sum_from(x: jax.Array) -> jax.Array:
    """Return the sums over the last axis from each index to the end."""
    return jnp.cumsum(x[..., ::-1], -1)[..., ::-1]


def _standardised(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Standardise `x` [P,K,T] over all tokens of its group; 0 if they are equal, and 0 outside the tokens."""
    flat, mask = (a.reshape(len(tokens), -1) for a in (as_float(x), tokens))
    deviation = jnp.maximum(masked_std(flat, mask), TEMPERATURE_FLOOR)
    return scaled(centred(flat, mask), deviation).reshape(tokens.shape)
