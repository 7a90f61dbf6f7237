"""Sparse targets, which give some responses exactly zero probability, beside the Gibbs target.

Every target is w* = argmax <w, u> - D(w, P_t) over the simplex, with u = R / tau: softmax for a KL, entmax and
sparsemax for a Bregman divergence under which w can reach 0, and one-hot for D = 0. D is scaled so that all targets
agree at a high temperature: on-policy, w* = (1 + u - mean u) / K. So a temperature has the same meaning for all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lpo_jax.objectives.simplex import listwise_log_probs
from lpo_jax.objectives.targets import HUGE, target_log_probs

ENTMAX_ALPHA = 1.5

# Bisection steps on an interval of length at most 1: even float64 has no number left between the ends.
_HALVINGS = 60


def entmax_log_probs(
    u: jax.Array, anchor: jax.Array | None, mask: jax.Array, alpha: float = ENTMAX_ALPHA
) -> jax.Array:
    """Return log w*, w* = argmax <w, u> - K^(a-1) D_h(w || P_t), for the Tsallis entropy h(p) = sum p^a / (a (a - 1)).

    The maximiser is w_k = [P_t^(a-1) + (a - 1) u_k / K^(a-1) - theta]_+ ^ (1 / (a-1)). Bisection finds the theta for
    which it sums to 1. On-policy, it is the alpha-entmax of u / K^(a-1). As a tends to 1, it tends to the softmax
    target; a = 2 is `sparsemax_log_probs`.

    Args:
      u: [P,K] utilities R / tau, up to a constant.
      anchor: [P,K] s_t, the scores at the start of the update; None means 0.
      mask: [P,K] bool, the valid responses.
      alpha: a > 1; the larger it is, the more responses get probability 0.

    Returns:
      [P,K] log w*, -inf where w* is 0. A group of equal utilities gives exactly log P_t.

    References:
      Peters, Niculae and Martins (2019), "Sparse sequence-to-sequence models"; Blondel, Martins and Niculae
      (2020), "Learning with Fenchel-Young losses", for the initial interval of the bisection.
    """
    log_p = listwise_log_probs(jnp.zeros_like(u) if anchor is None else anchor, mask)
    size = jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(u.dtype)
    below = jnp.where(mask, u - jnp.where(mask, u, -jnp.inf).max(-1, keepdims=True), 0)
    power = alpha - 1
    z = jnp.exp(power * log_p) + power * jnp.maximum(below, -HUGE) / size**power
    top = jnp.where(mask, z, 0).max(-1, keepdims=True)

    def weights(theta: jax.Array) -> jax.Array:
        return jnp.where(mask, jnp.maximum(z - theta, 0) ** (1 / power), 0)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = interval
        middle = (low + high) / 2
        enough = weights(middle).sum(-1, keepdims=True) >= 1
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The largest weight is 1 at one end and 1 / K at the other.
    low, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (top - 1, top - size**-power))
    w = weights(low)
    total = w.sum(-1, keepdims=True)
    log_w = jnp.where(w > 0, jnp.log(jnp.where(w > 0, w, 1) / jnp.where(total > 0, total, 1)), -jnp.inf)
    return jnp.where((below == 0).all(-1, keepdims=True), log_p, log_w)


def sparsemax_log_probs(u: jax.Array, anchor: jax.Array | None, mask: jax.Array) -> jax.Array:
    """Return log w*, w* = argmax <w, u> - K/2 ||w - P_t||^2: the point of the simplex nearest to P_t + u / K.

    Args and shapes as for `entmax_log_probs`.

    References:
      Martins and Astudillo (2016), "From softmax to sparsemax".
    """
    return entmax_log_probs(u, anchor, mask, alpha=2)


def one_hot_log_probs(u: jax.Array, anchor: jax.Array | None, mask: jax.Array) -> jax.Array:
    """Return the limit of the other targets at temperature 0: P_t restricted to the best responses, in logs."""
    best = mask & (u == jnp.where(mask, u, -jnp.inf).max(-1, keepdims=True))
    return listwise_log_probs(jnp.zeros_like(u) if anchor is None else anchor, best)


def gibbs_log_probs(u: jax.Array, anchor: jax.Array | None, mask: jax.Array) -> jax.Array:
    """Return log w*, w* = softmax(u + s_t), which is positive everywhere."""
    return target_log_probs(u, 1.0, anchor, mask)


# word -> (u [P,K] = R / tau up to a constant, s_t [P,K] or None, valid [P,K]) -> log w* [P,K], -inf where w* is 0
TARGETS: dict[str, Callable[[jax.Array, jax.Array | None, jax.Array], jax.Array]] = {
    "softmax": gibbs_log_probs,
    "entmax": entmax_log_probs,
    "sparsemax": sparsemax_log_probs,
    "one-hot": one_hot_log_probs,
}
