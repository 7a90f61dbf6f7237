"""Credit: utilities of tokens, where a method knows more of a response than its reward."""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.advantage import scaled
from lpo_jax.objectives.aggregate import RESPONSE_BUDGET
from lpo_jax.objectives.batch import Context, required
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, centred, masked_mean, masked_std
from lpo_jax.objectives.targets import TEMPERATURE_FLOOR

BUDGET_WEIGHTS = ("linear", "uniform", "last")


@dataclasses.dataclass(frozen=True)
class Credit(Part):
    """The base."""

    def __call__(self, context: Context, u: jax.Array, tau: jax.Array) -> jax.Array:
        """Utilities [P,K,T] of the tokens, or [P,K,1] where those of a response do not differ.

        Args:
          context: the minibatch.
          u: [P,K] the utilities of the responses.
          tau: [P,1] the temperature that they were divided by, in units of reward.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class EntropyCost(Credit):
    """u - beta H of a response's mean entropy H, and 0 for a response that is too unsure.

    Attributes:
      entropy_cost: beta.
      entropy_limit: largest H, in nats/token. The paper has ln 2, its code 0.7.

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
    """u plus what a token's segment did for the chance of the right answer.

    `Scored.credit` holds the gain in that chance over the segment that the token is in. It is taken relative to the
    mean of all tokens of the group, in units of their standard deviation.

    Attributes:
      progress_weight: what a gain of one deviation adds to u.

    References:
      GRPO-VPS. How the gain and the advantage are joined was not found: RECONSTRUCTED.
    """

    progress_weight: float = 1.0
    reads = (Field.CREDIT,)

    def __call__(self, context: Context, u: jax.Array, tau: jax.Array) -> jax.Array:
        return u[..., None] + self.progress_weight * _standardised(
            required(context.scored.credit), context.tokens
        )


@dataclasses.dataclass(frozen=True)
class StepPenalty(Credit):
    """u less a penalty on the tokens of wrong steps, which `Scored.credit` marks with 1; then over the group's tokens.

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
    """What a response is worth from each of its segments on, had it been cut short at one of several budgets.

    A response is cut after 1/S, 2/S, ... of `max_tokens`; token t is in segment s = min(t S // max_tokens, S - 1).
    `Scored.credit` holds, on the tokens of segment s, the mean reward r_s of answers given at the cut that ends it;
    where a response has ended before, r_s is its own reward. With weights w of the budgets,

        return_s = sum_{s' >= s} w_s' r_s'        A_s = (return_s - (s V1 + (S - s) V2) / S) / tau

    with V2 the group's mean return, and V1 the mean of the response's earlier r (each counting twice as much as the
    one before it) times the weight of the budgets to come.

    Attributes:
      budgets: S.
      budget_weights: "linear" (in the budget's length), "uniform", or "last" (the full budget alone).
      max_tokens: the response budget of the run; `lpo train` sets it unless it is given.

    References:
      AnytimeReasoner (BRPO), arXiv 2505.13438; public code sail-sg/AnytimeReasoner.
    """

    budgets: int = 4
    budget_weights: str = "linear"
    max_tokens: int = RESPONSE_BUDGET
    reads = (Field.CREDIT,)

    def weights(self) -> jax.Array:
        """w [S], of sum 1."""
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
        # Of the segments before: the first has none, and its V1 has weight 0.
        earlier = jnp.cumsum(twice * r, -1) / jnp.cumsum(twice)
        V1 = jnp.pad(earlier[..., :-1], ((0, 0), (0, 0), (1, 0))) * _sum_from(w)
        V2 = masked_mean(returns, context.valid[..., None], 1, keepdims=True)
        A = returns - (s * V1 + (S - s) * V2) / S
        return scaled(jnp.where(context.valid[..., None], A, 0), tau[..., None])[..., segment]


def _sum_from(x: jax.Array) -> jax.Array:
    """Sums over the last axis from each place to the end."""
    return jnp.cumsum(x[..., ::-1], -1)[..., ::-1]


def _standardised(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """`x` [P,K,T] over all tokens of its group: mean 0 and deviation 1, or 0 where they are equal; 0 outside."""
    flat, mask = (a.reshape(len(tokens), -1) for a in (as_float(x), tokens))
    deviation = jnp.maximum(masked_std(flat, mask), TEMPERATURE_FLOOR)
    return scaled(centred(flat, mask), deviation).reshape(tokens.shape)
