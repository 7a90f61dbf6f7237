"""Projections of the policy onto the target: divergences on the simplex and their coefficients.

A divergence is one scalar function of (log P, log w*). Its coefficients are c_k = d loss / d s_k, where
P = softmax(s): by the chain rule P_k (g_k - sum_j P_j g_j) with g = d loss / d P, which sums to 0 over the
group whatever the divergence. Autodiff gives them; forward and reverse KL have their closed forms.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lpo_jax.objectives.hints import nearest
from lpo_jax.objectives.simplex import as_float
from lpo_jax.objectives.targets import HUGE


@dataclasses.dataclass(frozen=True)
class Divergence:
    """One way to measure how far the policy P is from the target w*.

    Attributes:
      name: as `divergence(name)` knows it.
      formula: the loss in one line.
      loss: (log_p, log_w, inside) -> [P], of [P,K] arrays. They are finite: where a probability is 0 its log
        is -1e30. `inside` marks the responses of the group, for a loss that counts them.
      closed_form: (log_p, log_w) -> [P,K] coefficients of the same finite arrays; None means autodiff.
      through_softmax: False for a loss on each log-prob by itself, which leaves the other responses alone.
    """

    name: str
    formula: str
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    closed_form: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    through_softmax: bool = True

    def value(self, log_p: ArrayLike, log_w: ArrayLike) -> jax.Array:
        """The loss of each group.

        Args:
          log_p: [P,K] log P, as `listwise_log_probs` gives it; -inf where the response is invalid.
          log_w: [P,K] log w*, as `target_log_probs` gives it.

        Returns:
          [P], in nats; 0 for a group without valid responses.
        """
        return self.loss(*_finite(log_p, log_w))

    def coefficients(self, log_p: ArrayLike, log_w: ArrayLike) -> jax.Array:
        """c_k = d value / d s_k for P = softmax(s), with w* held fixed.

        Args and shapes as for `value`.

        Returns:
          [P,K], 0 where invalid; negative where the loss asks for a larger P_k.
        """
        if self.closed_form is None:
            return self.autodiff_coefficients(log_p, log_w)
        log_p, log_w, _ = _finite(log_p, log_w)
        return self.closed_form(log_p, log_w)

    def autodiff_coefficients(self, log_p: ArrayLike, log_w: ArrayLike) -> jax.Array:
        """The same as `coefficients`, from `loss` alone."""
        log_p, log_w, inside = _finite(log_p, log_w)
        h = jax.grad(lambda x: self.loss(x, log_w, inside).sum())(log_p)  # [P,K] P_k g_k
        return h - jnp.exp(log_p) * h.sum(-1, keepdims=True) if self.through_softmax else h


def divergence(name: str) -> Divergence:
    """The divergence called `name`: one of `DIVERGENCES`.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in DIVERGENCES:
        known = ", ".join(DIVERGENCES)
        raise ValueError(f"unknown divergence {name!r}{nearest(name, DIVERGENCES)} (known: {known})")
    return DIVERGENCES[name]


def _finite(log_p: ArrayLike, log_w: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both logs with -1e30 for -inf, so that 0 log 0 is 0; and the mask of the responses in the group."""
    log_p, log_w = as_float(log_p), as_float(log_w)
    inside = (log_p > -jnp.inf) | (log_w > -jnp.inf)
    return jnp.maximum(log_p, -HUGE), jnp.maximum(log_w, -HUGE), inside


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    return (jnp.exp(log_a) * (log_a - log_b)).sum(-1)  # [P]


def _reverse_kl_coefficients(log_p: jax.Array, log_w: jax.Array) -> jax.Array:
    p, d = jnp.exp(log_p), log_p - log_w
    return p * (d - (p * d).sum(-1, keepdims=True))


def _forward_onpolicy_loss(log_p: jax.Array, log_w: jax.Array, inside: jax.Array) -> jax.Array:
    uniform = 1 / jnp.maximum(inside.sum(-1, keepdims=True), 1)
    return jnp.where(inside, (uniform - jnp.exp(log_w)) * log_p, 0).sum(-1)


DIVERGENCES = {
    d.name: d
    for d in (
        # LPO equation 10: c = P - w*, bounded by 1. A log-barrier: w*_k > 0 keeps P_k from 0 (corollary 2).
        Divergence(
            "forward-kl",
            "KL(w* || P)",
            lambda log_p, log_w, inside: _kl(log_w, log_p),
            lambda log_p, log_w: jnp.exp(log_p) - jnp.exp(log_w),
        ),
        # LPO equation 11: c = P (d - dbar), d = s - R / tau - s_t. On-policy it equals the policy gradient.
        Divergence(
            "reverse-kl",
            "KL(P || w*)",
            lambda log_p, log_w, inside: _kl(log_p, log_w),
            _reverse_kl_coefficients,
        ),
        # Control: forward KL whose coefficient is frozen where P is uniform, c = 1/K - w*. It is the policy
        # gradient with A' = K w* - 1, so what it lacks against forward-kl is self-correction alone.
        Divergence("forward-onpolicy", "sum_k (1/K - w*_k) log P_k", _forward_onpolicy_loss),
        # Control: weighted regression (MPO, AWR) on the same target: c = -w* never vanishes (LPO, 5.4.1). The
        # value is the cross-entropy to P; the coefficient leaves out P's normaliser, on purpose.
        Divergence(
            "pointwise",
            "- sum_k w*_k log pi(y_k)",
            lambda log_p, log_w, inside: -(jnp.exp(log_w) * log_p).sum(-1),
            through_softmax=False,
        ),
    )
}
