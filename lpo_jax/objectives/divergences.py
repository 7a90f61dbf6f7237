"""Divergences on the simplex, which project the policy onto the target, and their coefficients.

A divergence is a scalar function of (log P, log w*). Its coefficients are c_k = d loss / d s_k for P = softmax(s). By
the chain rule, c_k = P_k (g_k - sum_j P_j g_j) with g = d loss / d P, which sums to 0 over the group for every
divergence. Autodiff computes them; forward and reverse KL have closed forms.

Every divergence is scaled so that all agree to second order near a uniform P: at a high temperature, the on-policy
coefficients are c = -A / K, those of the policy gradient. So one learning rate serves all of them.

A new divergence is one scalar function: `f_divergence` takes a convex f of the ratio w* / P, `bregman` a convex
generator h of a probability, and `Divergence` a loss of both log-probs. Pass it as `O.get(method, divergence=mine)`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lpo_jax.objectives.checks import did_you_mean
from lpo_jax.objectives.simplex import as_float, masked_mean
from lpo_jax.objectives.targets import HUGE

# Lower bound of log-probs in `f_divergence` and `bregman`: the square of its inverse is still a finite float32.
LOG_FLOOR = -40.0

ALPHA = 0.5


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A measure of how far the policy P is from the target w*.

    Attributes:
      name: its name, as in `divergence(name)`.
      formula: the loss in one line.
      loss: (log_p, log_w, inside) -> [P], of finite [P,K] arrays: the log of a probability of 0 is -1e30. `inside`
        marks the responses of the group, for a loss that counts them.
      closed_form: (log_p, log_w) -> [P,K] coefficients of the same finite arrays; None means autodiff.
      through_softmax: False for a loss on each log-prob separately, whose gradient ignores the normaliser of P.
      full_support: True for a loss that is infinite where the target is 0, and so requires a positive target.
    """

    name: str
    formula: str
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    closed_form: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    through_softmax: bool = True
    full_support: bool = False

    def value(self, log_p: ArrayLike, log_w: ArrayLike) -> jax.Array:
        """Return the loss of each group.

        Args:
          log_p: [P,K] log P, as `listwise_log_probs` returns it; -inf where the response is invalid.
          log_w: [P,K] log w*, as `target_log_probs` returns it.

        Returns:
          [P], in nats; 0 for a group without valid responses.
        """
        return self.loss(*_finite(log_p, log_w))

    def coefficients(self, log_p: ArrayLike, log_w: ArrayLike) -> jax.Array:
        """Return c_k = d value / d s_k for P = softmax(s), with w* constant.

        Args and shapes as for `value`.

        Returns:
          [P,K], 0 where invalid; negative where a larger P_k lowers the loss.
        """
        if self.closed_form is None:
            return self.autodiff_coefficients(log_p, log_w)
        log_p, log_w, _ = _finite(log_p, log_w)
        return self.closed_form(log_p, log_w)

    def autodiff_coefficients(self, log_p: ArrayLike, log_w: ArrayLike) -> jax.Array:
        """Return the same as `coefficients`, by autodiff of `loss`. Args and shapes as for `value`."""
        log_p, log_w, inside = _finite(log_p, log_w)
        h: jax.Array = jax.grad(lambda x: self.loss(x, log_w, inside).sum())(log_p)  # [P,K] P_k g_k
        return h - jnp.exp(log_p) * h.sum(-1, keepdims=True) if self.through_softmax else h


def divergence(name: str | Divergence) -> Divergence:
    """Return the divergence called `name`, one of `DIVERGENCES`; a `Divergence` is returned unchanged.

    Raises:
      ValueError: no divergence has this name.
    """
    if isinstance(name, Divergence):
        return name
    if name not in DIVERGENCES:
        known = ", ".join(DIVERGENCES)
        raise ValueError(f"unknown divergence {name!r}{did_you_mean(name, DIVERGENCES)} (known: {known})")
    return DIVERGENCES[name]


def f_divergence(
    name: str, formula: str, f: Callable[[jax.Array], jax.Array], full_support: bool = False
) -> Divergence:
    """Return the divergence sum_k P_k f(w*_k / P_k) / f''(1) of a convex function f of the ratio.

        O.f_divergence("triangle", "sum (P - w*)^2 / (P + w*)", lambda t: (t - 1) ** 2 / (t + 1))

    Args:
      name, formula: its name and its loss in one line, for messages and tables.
      f: elementwise function in jax.numpy for ratios > 0, convex, with f''(1) > 0. Adding a constant or a multiple of
        t - 1 has no effect.
      full_support: whether f(t) is unbounded as t tends to 0.

    References:
      Csiszar (1967); Ali and Silvey (1966).
    """

    def loss(log_p: jax.Array, log_w: jax.Array, inside: jax.Array) -> jax.Array:
        log_p, log_w = _floored(log_p, LOG_FLOOR), _floored(log_w, LOG_FLOOR)
        terms = jnp.exp(log_p) * (f(jnp.exp(log_w - log_p)) - f(jnp.ones_like(log_p)))
        curvature: jax.Array = jax.grad(jax.grad(f))(jnp.ones((), log_p.dtype))
        return jnp.where(inside, terms, 0).sum(-1) / curvature

    return Divergence(name, formula, loss, full_support=full_support)


@functools.cache  # one object per alpha, so that equal objectives compare equal
def alpha_divergence(alpha: float) -> Divergence:
    """Return the divergence (1 - sum_k w*_k^a P_k^(1-a)) / (a (1 - a)): reverse KL at a = 0, forward KL at a = 1.

    a = 1/2 is the squared Hellinger distance, a = 2 chi-squared, a = -1 chi-squared with P and w* exchanged.

    References:
      Amari (1985), in the parametrisation of Minka (2005), "Divergence measures and message passing".
    """
    if alpha == 0:
        return DIVERGENCES["reverse-kl"]
    if alpha == 1:
        return DIVERGENCES["forward-kl"]

    def loss(log_p: jax.Array, log_w: jax.Array, inside: jax.Array) -> jax.Array:
        mixed = jnp.exp(-_floored(-(alpha * log_w + (1 - alpha) * log_p), -math.log(HUGE)))
        return (mixed - alpha * jnp.exp(log_w) - (1 - alpha) * jnp.exp(log_p)).sum(-1) / (alpha * (alpha - 1))

    formula = "(1 - sum w*^a P^(1-a)) / (a (1-a))"
    return Divergence("alpha", formula, loss, full_support=alpha < 0)


def bregman(
    name: str, formula: str, h: Callable[[jax.Array], jax.Array], full_support: bool = False
) -> Divergence:
    """Return the divergence sum_k h(w*_k) - h(P_k) - h'(P_k) (w*_k - P_k), divided by h''(1/K) / K, of a convex h.

    On-policy, its coefficients are exactly P - w* for every h; they differ off-policy.

        O.bregman("entropy", "KL(w* || P)", lambda p: p * jnp.log(p))

    Args:
      name, formula: its name and its loss in one line, for messages and tables.
      h: elementwise function in jax.numpy for probabilities > 0, strictly convex, twice differentiable.
      full_support: whether h(p) is unbounded as p tends to 0.

    References:
      Bregman (1967); Banerjee et al. (2005), "Clustering with Bregman divergences".
    """

    def slope(p: jax.Array) -> jax.Array:
        slope: jax.Array = jax.grad(lambda p: h(p).sum())(p)
        return slope

    def loss(log_p: jax.Array, log_w: jax.Array, inside: jax.Array) -> jax.Array:
        p, w = (jnp.exp(_floored(x, LOG_FLOOR)) for x in (log_p, log_w))
        uniform = 1 / jnp.maximum(inside.sum(-1), 1).astype(p.dtype)  # [P]
        curvature: jax.Array = jax.grad(lambda p: slope(p).sum())(uniform)
        terms = h(w) - h(p) - slope(p) * (w - p)
        return jnp.where(inside, terms, 0).sum(-1) / (curvature * uniform)

    return Divergence(name, formula, loss, full_support=full_support)


def _finite(log_p: ArrayLike, log_w: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return both logs with -1e30 for -inf, so that 0 log 0 is 0, and the mask of the responses in the group."""
    log_p, log_w = as_float(log_p), as_float(log_w)
    inside = (log_p > -jnp.inf) | (log_w > -jnp.inf)
    return jnp.maximum(log_p, -HUGE), jnp.maximum(log_w, -HUGE), inside


def _floored(log_x: jax.Array, floor: float) -> jax.Array:
    """Clamp `log_x` to at least `floor`, straight-through: the derivative is 1 below the floor too."""
    return jax.lax.stop_gradient(jnp.maximum(log_x, floor)) + (log_x - jax.lax.stop_gradient(log_x))


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    return (jnp.exp(log_a) * (log_a - log_b)).sum(-1)  # [P]


def _reverse_kl_coefficients(log_p: jax.Array, log_w: jax.Array) -> jax.Array:
    p, d = jnp.exp(log_p), log_p - log_w
    return p * (d - (p * d).sum(-1, keepdims=True))


def _forward_onpolicy_loss(log_p: jax.Array, log_w: jax.Array, inside: jax.Array) -> jax.Array:
    uniform = 1 / jnp.maximum(inside.sum(-1, keepdims=True), 1)
    return jnp.where(inside, (uniform - jnp.exp(log_w)) * log_p, 0).sum(-1)


def _logit_variance(log_p: jax.Array, log_w: jax.Array, inside: jax.Array) -> jax.Array:
    d = jnp.where(inside, log_p - log_w, 0).clip(-(HUGE**0.5), HUGE**0.5)  # its square is finite
    return masked_mean(jnp.square(d - masked_mean(d, inside, -1, keepdims=True)), inside, -1) / 2


DIVERGENCES = {
    d.name: d
    for d in (
        # LPO equation 10: c = P - w*, bounded by 1. w*_k > 0 acts as a log barrier that keeps P_k > 0 (corollary 2).
        Divergence(
            "forward-kl",
            "KL(w* || P)",
            lambda log_p, log_w, inside: _kl(log_w, log_p),
            lambda log_p, log_w: jnp.exp(log_p) - jnp.exp(log_w),
        ),
        # LPO equation 11: c = P (d - dbar), d = s - R / tau - s_t. On-policy, it equals the policy gradient.
        Divergence(
            "reverse-kl",
            "KL(P || w*)",
            lambda log_p, log_w, inside: _kl(log_p, log_w),
            _reverse_kl_coefficients,
            full_support=True,
        ),
        f_divergence(
            "jeffreys", "(KL(w* || P) + KL(P || w*)) / 2", lambda t: (t - 1) * jnp.log(t), full_support=True
        ),
        # m = (P + w*) / 2. It is at most 4 log 2.
        f_divergence(
            "js",
            "2 KL(w* || m) + 2 KL(P || m), m = (P + w*) / 2",
            lambda t: t * jnp.log(t) - (t + 1) * jnp.log((t + 1) / 2),
        ),
        alpha_divergence(ALPHA),
        f_divergence("hellinger", "2 sum (sqrt P - sqrt w*)^2", lambda t: jnp.square(jnp.sqrt(t) - 1)),
        f_divergence("chi2", "1/2 sum (P - w*)^2 / P", lambda t: jnp.square(t - 1)),
        bregman("brier", "K/2 sum (P - w*)^2", lambda p: jnp.square(p) / 2),
        # A steeper barrier than that of forward KL.
        bregman("itakura-saito", "1/K sum (w*/P - log(w*/P) - 1)", lambda p: -jnp.log(p), full_support=True),
        # c = (d - mean d) / K: the second-order surrogate of reverse KL at a uniform P, unbounded away from it.
        Divergence("logit-var", "1/2 Var_k(log P_k - log w*_k)", _logit_variance, full_support=True),
        # Control: forward KL with the coefficient of a uniform P, c = 1/K - w*. It is the policy gradient with
        # A' = K w* - 1, so it differs from forward-kl only in the lack of self-correction.
        Divergence("forward-onpolicy", "sum_k (1/K - w*_k) log P_k", _forward_onpolicy_loss),
        # Control: weighted regression (MPO, AWR) on the same target: c = -w* never vanishes (LPO, 5.4.1). The
        # value is the cross-entropy to P; the coefficient deliberately ignores the normaliser of P.
        Divergence(
            "pointwise",
            "- sum_k w*_k log pi(y_k)",
            lambda log_p, log_w, inside: -(jnp.exp(log_w) * log_p).sum(-1),
            through_softmax=False,
        ),
    )
}
