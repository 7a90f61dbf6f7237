"""Proximal penalties with a scheduled weight (MDPO), and the dual variable of the ratio-variance penalty (R2VPO)."""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, ControlState, Listwise, TokenStats, required
from lpo_jax.objectives.control import Control
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.regular import Regular, with_rest
from lpo_jax.objectives.simplex import masked_mean
from lpo_jax.objectives.trust import ratio


@dataclasses.dataclass(frozen=True)
class PreviousKL(Regular):
    """KL(pi_theta || pi_old) / t at every position of a response, over pi_old's top-k tokens and one bin for the rest.

    The weight 1 / t rises during the run: t falls linearly from `step_size` towards 0 and stops at a share of
    `step_size`, because otherwise the last steps would not change the policy at all.

    Attributes:
      step_size: t at the first step of the run.
      step_floor: least t, as a share of `step_size`.

    References:
      MDPO, arXiv 2005.09814.
    """

    step_size: float = 1.0
    step_floor: float = 0.05
    metric = "lpo/previous_kl"
    reads = (Field.TOP_LOGP, Field.TEACHER, Field.PROGRESS)
    differentiates = (Field.TOP_LOGP,)

    @property
    def coefficient(self) -> float:
        return 1 / self.step_size

    def weight(self, context: Context) -> jax.Array:
        return self.coefficient / jnp.maximum(1 - required(context.scored.progress), self.step_floor)

    def __call__(self, stats: TokenStats, context: Context) -> jax.Array:
        teacher = required(context.scored.teacher)
        tokens = context.tokens & teacher.valid[..., None]
        log_p, log_q = (with_rest(x, tokens) for x in (required(stats.top_logp), teacher.logp))
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        # -p + q sums to 0 over the bins, and makes the slope of each single bin 0 where p = q.
        return jnp.where(tokens, (p * (log_p - log_q) - p + q).sum(-1), 0)


@dataclasses.dataclass(frozen=True)
class RatioVarianceDual(Control):
    """The multiplier lambda of the ratio's variance, by dual ascent: lambda <- max(0, lambda + eta (E - limit)).

    E is the mean of (rho - 1)^2 over the tokens of the minibatch. The state is lambda, a scalar, which the gate
    `RatioVariance` reads. The paper's constants were not found: these are ours.

    Attributes:
      dual_start: lambda at the start; with 2.5 and |A| = 1, the stationary ratio differs from 1 by 0.2.
      dual_rate: eta.
      variance_limit: the value of E above which lambda grows.

    References:
      R2VPO, arXiv 2601.03320.
    """

    dual_start: float = 2.5
    dual_rate: float = 10.0
    variance_limit: float = 1e-3

    def init(self) -> jax.Array:
        price: jax.Array = jnp.float32(self.dual_start)
        return price

    def update(self, state: ControlState, context: Context, view: Listwise) -> jax.Array:
        variance = masked_mean(jnp.square(ratio(context.delta) - 1), context.tokens)
        price: jax.Array = state + self.dual_rate * (variance - self.variance_limit)
        return jnp.maximum(price, 0).astype(jnp.float32)
