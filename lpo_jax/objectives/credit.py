"""Credit: utilities of single tokens, for methods with more information about a response than its reward."""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.advantage import scaled
from lpo_jax.objectives.aggregate import RESPONSE_BUDGET
from lpo_jax.objectives.batch import Context, Field, required
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, centred, masked_mean, masked_std
from lpo_jax.objectives.targets import TEMPERATURE_FLOOR

BUDGET_WEIGHTS = ("linear", "uniform", "last")


@dataclasses.dataclass(frozen=True)
class Credit(Part):
    """The base class."""

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
        return u[..., None] + self.progress_weight * _standardised(
            required(context.scored.credit), context.tokens
        )


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
        return _standardised(
            u[..., None] - self.step_penalty * as_float(required(context.scored.credit)), context.tokens
        )


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
