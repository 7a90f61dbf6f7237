"""Trust-region gates that depend on the whole response or on the tokens before, not only on one token.

The ratio of a response is the exponential of its mean log-ratio, or of the sum if the class says so. In a gate that
clips whole responses, the loss of each token has the value of the sequence ratio and the gradient of the token's own
log-ratio. So token weights and aggregations have the same meaning as for the other gates. With "seq-mean-token-mean",
this is the exact gradient of the loss -A s_k of the sequence ratio s_k.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, Field, required
from lpo_jax.objectives.simplex import as_float, sequence_scores
from lpo_jax.objectives.trust import Gate, RatioClip, WeightClip, magnitude, ratio


def mean_log_ratio(delta: jax.Array, context: Context) -> jax.Array:
    """Return the mean [P,K,1] of a response's log-ratios [P,K,T]."""
    return sequence_scores(delta, context.tokens)[..., None]


def sequence_ratio(delta: jax.Array, context: Context) -> jax.Array:
    """Return exp(mean delta) at every token [P,K,T], with the gradient of the token's own log-ratio."""
    mean = jax.lax.stop_gradient(mean_log_ratio(delta, context))
    return ratio(mean + (delta - jax.lax.stop_gradient(delta)))


@dataclasses.dataclass(frozen=True)
class SequenceClip(RatioClip):
    """PPO's surrogate of the sequence ratio s_k = exp(mean delta).

    References:
      GSPO, arXiv 2507.18071, its token form; verl, `compute_policy_loss_gspo`.
    """

    epsilon_low: float = 3e-4
    epsilon_high: float = 4e-4

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        s = sequence_ratio(delta, context)
        return self.pessimistic(s, self.clipped(s), c)


@dataclasses.dataclass(frozen=True)
class GeometricClip(Gate):
    """phi = c exp(mean of the log-ratios, each clipped to [-low, high]): per-token clips, one weight per sequence.

    A token is clipped only in the direction in which its response moves it, as in PPO.

    Attributes:
      log_epsilon_low, log_epsilon_high: the range, in nats.

    References:
      GMPO, arXiv 2507.20673; verl, `compute_policy_loss_geo_mean`.
    """

    log_epsilon_low: float = 0.4
    log_epsilon_high: float = 0.4

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        clipped = jnp.clip(delta, -self.log_epsilon_low, self.log_epsilon_high)
        pessimistic = jnp.where(c < 0, jnp.minimum(delta, clipped), jnp.maximum(delta, clipped))
        return c * sequence_ratio(pessimistic, context)


@dataclasses.dataclass(frozen=True)
class HybridClip(RatioClip):
    """PPO's surrogate of a mixture a rho + (1 - a) s of token and sequence ratio, each with its own clip range.

    phi = max(c (a rho + (1 - a) s), c (a clip(rho) + (1 - a) clip(s))), s = exp(mean delta). The abstract says that the
    two are clipped before they are mixed. It does not say where PPO's minimum is taken, nor the ranges.

    Attributes:
      token_share: a, or "entropy", for which a is the entropy of the token divided by the largest of the minibatch, so
        that tokens of high entropy use their own ratio.
      epsilon_low, epsilon_high: clip range of the token ratio.
      sequence_epsilon_low, sequence_epsilon_high: clip range of the sequence ratio.

    References:
      DHPO, arXiv 2601.05607, as third-party notes describe it.
    """

    token_share: float | str = 0.5
    sequence_epsilon_low: float = 3e-4
    sequence_epsilon_high: float = 4e-4

    @property
    def needs(self) -> tuple[Field, ...]:
        return (Field.ENTROPY,) if self.token_share == "entropy" else ()

    def share(self, context: Context) -> float | jax.Array:
        """Return a, a number or [P,K,T] in [0, 1]."""
        if not isinstance(self.token_share, str):
            return self.token_share
        entropy = jnp.where(context.tokens, as_float(required(context.stats.entropy)), 0)
        return entropy / jnp.maximum(entropy.max(initial=0), 1e-6)

    def ratios(self, delta: jax.Array, context: Context) -> tuple[jax.Array, ...]:
        """Return rho, s, and their clipped values, [P,K,T] each."""
        rho, s = ratio(delta), sequence_ratio(delta, context)
        clipped_s = jnp.clip(s, 1 - self.sequence_epsilon_low, 1 + self.sequence_epsilon_high)
        return rho, s, self.clipped(rho), clipped_s

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        a = self.share(context)
        rho, s, clipped_rho, clipped_s = self.ratios(delta, context)
        return self.pessimistic(a * rho + (1 - a) * s, a * clipped_rho + (1 - a) * clipped_s, c)

    def acts(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        # If only one of the two ratios is clipped, the gradient of the other remains.
        a = self.share(context)
        rho, s, clipped_rho, clipped_s = self.ratios(delta, context)
        out = (rho != clipped_rho) | (s != clipped_s)
        worse = c * (a * (clipped_rho - rho) + (1 - a) * (clipped_s - s)) >= 0
        return (out & worse) | super().acts(delta, c, context)


@dataclasses.dataclass(frozen=True)
class FiberClip(Gate):
    """phi = c r_b r_f: the clipped ratio of the response times the clipped ratios of its tokens relative to it.

    r_b = exp(clip(m, +-base_epsilon)), r_f = exp(clip(delta - m, +-fiber_epsilon)), m = mean delta; both factors carry
    a gradient. The residual is relative to the mean itself, so a response that drifted as a whole is clipped by r_b
    only; in the public code, it is relative to the clipped mean.

    Attributes:
      base_epsilon: clip range of a response, in nats.
      fiber_epsilon: clip range of a token relative to its response, in nats.

    References:
      FiberPO, arXiv 2603.08239, section 4; a third party's code.
    """

    base_epsilon: float = 0.2
    fiber_epsilon: float = 0.2

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        mean = mean_log_ratio(delta, context)
        base = jnp.clip(mean, -self.base_epsilon, self.base_epsilon)
        fiber = jnp.clip(delta - mean, -self.fiber_epsilon, self.fiber_epsilon)
        return c * jnp.exp(base + fiber)

    def acts(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        # If one factor is clipped, the gradient of the other remains.
        mean = mean_log_ratio(delta, context)
        return (jnp.abs(mean) > self.base_epsilon) | (jnp.abs(delta - mean) > self.fiber_epsilon)


@dataclasses.dataclass(frozen=True)
class BudgetClip(Gate):
    """phi = c (1 + clip(rho - 1, +-B)): a response has a budget of total variation, which its tokens share.

    B_t = max(0, n D - sum over the other tokens of |rho - 1|) for n tokens is what the other tokens leave. It carries a
    gradient too: beyond the budget, every token is moved back.

    Attributes:
      variation_budget: D, the mean of |rho - 1| that a response may reach.

    References:
      APC-Obj, arXiv 2603.08239, definition 3.2; a third party's code, whose D has no default.
    """

    variation_budget: float = 0.2

    def moves(self, delta: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """Return rho - 1 and B_t, both [P,K,T]."""
        moved = ratio(delta) - 1
        used = jnp.where(context.tokens, magnitude(moved), 0)
        others = used.sum(-1, keepdims=True) - used
        return moved, jnp.maximum(context.lengths[..., None] * self.variation_budget - others, 0)

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        moved, budget = self.moves(delta, context)
        return c * (1 + jnp.clip(moved, -budget, budget))

    def acts(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        # A clipped token still has a gradient, because its change reduces the budgets of the others.
        moved, budget = self.moves(delta, context)
        return jnp.abs(moved) > budget


@dataclasses.dataclass(frozen=True)
class PrefixWeightClip(WeightClip):
    """`WeightClip` of the weight rho_t min over i < t of rho_i; the minimum over an empty prefix is 1.

    The exact weight is the product over the prefix, whose variance explodes; its smallest factor replaces it.

    References:
      MinPRO, arXiv 2601.22718, as third-party notes quote its objective.
    """

    def log_weight(self, delta: jax.Array, context: Context) -> jax.Array:
        until = jax.lax.cummin(jnp.where(context.tokens, delta, jnp.inf), axis=2)
        before = jnp.pad(until, ((0, 0), (0, 0), (1, 0)), constant_values=jnp.inf)[..., :-1]
        return delta + jnp.where(before < jnp.inf, before, 0)


@dataclasses.dataclass(frozen=True)
class TaperedWeight(Gate):
    """phi = c delta where c < 0, and c sg(min(1, rho_k)) delta where c > 0, rho_k = exp(sum delta).

    Responses with c < 0 keep their full weight however off-policy they are; the weight of the others decreases with
    their probability.

    References:
      TOPR, arXiv 2503.14286.
    """

    def total(self, delta: jax.Array, context: Context) -> jax.Array:
        """Return log rho_k [P,K,1], without gradient."""
        return sequence_scores(jax.lax.stop_gradient(delta), context.tokens, "sum")[..., None]

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return c * jnp.where(c < 0, 1, ratio(jnp.minimum(self.total(delta, context), 0))) * delta

    def acts(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return (c > 0) & (self.total(delta, context) > 0)
