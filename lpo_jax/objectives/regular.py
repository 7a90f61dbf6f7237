"""Token penalties that are added to the loss: stay near a reference, keep the entropy, learn from a teacher.

A penalty is a differentiable function of the policy's statistics at each token. Unlike the coefficients of the
responses, it does not depend on rewards. `mirror.py` has the penalties of GBMPO.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, ControlState, Field, Listwise, TokenStats, required
from lpo_jax.objectives.part import Control, Part
from lpo_jax.objectives.simplex import as_float, masked_mean
from lpo_jax.objectives.trust import MAX_LOG_RATIO, magnitude, ratio

KLS = ("k1", "k2", "k3", "abs")


@dataclasses.dataclass(frozen=True)
class Regular(Part):
    """The base class: adds `weight` times the mean penalty to the loss, averaged over tokens as the method's loss is.

    A part with `coefficient` 0 is inactive: it needs no field and writes no metric.

    Attributes:
      metric: name of the metric of the mean penalty, before it is multiplied by the weight.
      differentiates: the fields of `TokenStats` with respect to which the penalty has a gradient.
    """

    metric: ClassVar[str]
    differentiates: ClassVar[tuple[Field, ...]] = (Field.LOGP,)

    @property
    def coefficient(self) -> float:
        """The option that scales the penalty; 0 switches it off."""
        raise NotImplementedError

    @property
    def needs(self) -> tuple[Field, ...]:
        return self.reads if self.coefficient else ()

    def weight(self, context: Context) -> float | jax.Array:
        """Return the factor of the mean penalty, a scalar."""
        return self.coefficient

    def __call__(self, stats: TokenStats, context: Context) -> jax.Array:
        """Return the penalty [P,K,T] of each token, 0 outside `context.tokens`.

        Args:
          stats: statistics of the current policy, to differentiate with respect to; any value outside the tokens.
          context: the minibatch, without gradient.
        """
        raise NotImplementedError


def reference_log_ratio(stats: TokenStats, context: Context) -> jax.Array:
    """Return log pi_theta - log pi_ref [P,K,T], 0 outside the tokens; the reference is a constant."""
    log_ref = jax.lax.stop_gradient(as_float(required(stats.ref_logp)))
    return jnp.where(context.tokens, as_float(stats.logp) - log_ref, 0)


@dataclasses.dataclass(frozen=True)
class KL(Regular):
    """An estimate of KL(pi_theta || pi_ref) from d = log pi_theta - log pi_ref at the sampled token.

    Attributes:
      kl_coef: its weight in the loss; 0 switches it off, and then no reference model is needed.
      kl: "k1": d, whose gradient has mean 0, so that it measures the KL but does not limit it. "k2": d^2 / 2, whose
        gradient is that of the KL. "k3": exp(-d) + d - 1, which is never negative (GRPO's choice). "abs": |d|.

    References:
      Schulman, Approximating KL Divergence (2020); verl, `kl_penalty`.
    """

    kl_coef: float = 0.0
    kl: str = "k3"
    metric = "actor/kl_loss"
    reads: ClassVar[tuple[Field, ...]] = (Field.REF_LOGP,)

    @property
    def coefficient(self) -> float:
        return self.kl_coef

    def __call__(self, stats: TokenStats, context: Context) -> jax.Array:
        d = reference_log_ratio(stats, context)
        if self.kl == "k2":
            return jnp.square(d) / 2
        if self.kl == "k3":
            # Beyond this bound, exp would overflow.
            return jnp.exp(jnp.clip(-d, -MAX_LOG_RATIO, MAX_LOG_RATIO)) + d - 1
        return magnitude(d) if self.kl == "abs" else d


@dataclasses.dataclass(frozen=True)
class AdaptiveKL(KL):
    """`KL` with the weight kl_coef (tanh(a) + 1) / 2, which grows with the accuracy a of the minibatch.

    References:
      FG-ExPO, accuracy-conditioned KL.
    """

    kl_coef: float = 0.02

    def weight(self, context: Context) -> jax.Array:
        accuracy = masked_mean(context.passed, context.valid)
        return self.kl_coef * (jnp.tanh(accuracy) + 1) / 2


@dataclasses.dataclass(frozen=True)
class Entropy(Regular):
    """Minus the entropy of the next-token distribution.

    Under LPO, a higher temperature has the same effect: the target of an objective with an additional term gamma H is
    softmax(R / (tau + gamma)).

    Attributes:
      entropy_coef: its weight in the loss; 0 switches it off.
    """

    entropy_coef: float = 0.0
    metric = "actor/entropy_loss"
    reads = (Field.ENTROPY,)
    differentiates = (Field.ENTROPY,)

    @property
    def coefficient(self) -> float:
        return self.entropy_coef

    def __call__(self, stats: TokenStats, context: Context) -> jax.Array:
        return -jnp.where(context.tokens, as_float(required(stats.entropy)), 0)


@dataclasses.dataclass(frozen=True)
class Distil(Regular):
    """Jensen-Shannon divergence between teacher and policy at the tokens of the responses that have a teacher.

    a KL(teacher || m) + (1 - a) KL(policy || m), m = a teacher + (1 - a) policy, over the teacher's top-k tokens and
    one bin for all others. Tokens at which the teacher has a high entropy H count less: their weight is exp(-b H),
    divided by its mean over the tokens with a teacher in the minibatch.

    Attributes:
      distil_coef: its weight in the loss; 0 switches it off.
      distil_share: a, the teacher's share of the mixture.
      distil_decay: b, in 1/nats.

    References:
      SRPO and SDPO (self-distillation from a correct sibling), as third-party notes quote them.
    """

    distil_coef: float = 1.0
    distil_share: float = 0.5
    distil_decay: float = 1.0
    metric = "lpo/distil_jsd"
    reads = (Field.TOP_LOGP, Field.TEACHER)
    differentiates = (Field.TOP_LOGP,)

    @property
    def coefficient(self) -> float:
        return self.distil_coef

    def __call__(self, stats: TokenStats, context: Context) -> jax.Array:
        teacher = required(context.scored.teacher)
        tokens = context.tokens & teacher.valid[..., None]
        log_q, log_p = (with_rest(x, tokens) for x in (teacher.logp, required(stats.top_logp)))
        a = self.distil_share
        log_m = jnp.logaddexp(log_q + jnp.log(a), log_p + jnp.log1p(-a))
        divergence = a * jnp.exp(log_q) * (log_q - log_m) + (1 - a) * jnp.exp(log_p) * (log_p - log_m)
        sure = jnp.exp(-self.distil_decay * jnp.where(tokens, as_float(teacher.entropy), 0))
        # The mean is positive if any token has a teacher; otherwise the constant avoids 0 / 0.
        mean = jnp.where(tokens.any(), masked_mean(sure, tokens), 1)
        return jnp.where(tokens, sure / mean * divergence.sum(-1), 0)


def with_rest(logp: jax.Array, tokens: jax.Array) -> jax.Array:
    """Append to log-probs of J tokens the log-prob of all others, [P,K,T,J+1]; uniform outside `tokens`."""
    J = logp.shape[-1]
    logp = jnp.where(tokens[..., None], as_float(logp), -jnp.log(J + 1.0))
    # The rest of a float32 sum of probabilities is rounding error: below this floor it has no gradient.
    rest = jnp.log(jnp.maximum(1 - jnp.exp(logp).sum(-1, keepdims=True), 1e-6))
    return jnp.concatenate([logp, rest], -1)


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
