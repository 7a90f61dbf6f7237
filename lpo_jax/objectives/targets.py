"""From rewards to a target on the simplex: the temperature of a method, the Gibbs target and sparse ones."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special
from jax.typing import ArrayLike

from lpo_jax.objectives.checks import did_you_mean, is_number
from lpo_jax.objectives.simplex import (
    as_float,
    as_mask,
    centred,
    listwise_log_probs,
    masked_mean,
    masked_median,
    masked_std,
)

TEMPERATURE_FLOOR = 1e-6

# Replaces infinity in R / tau: far larger than any real logit, but the sum of K of them is a finite float32.
HUGE = 1e30


def temperature(
    rewards: ArrayLike,
    rule: str | float,
    mask: ArrayLike | None = None,
    *,
    ddof: int = 0,
    floor: float = TEMPERATURE_FLOOR,
) -> jax.Array:
    """Return the temperature tau of each group, in units of reward, by which the advantages are divided.

    | rule | tau | used by |
    |---|---|---|
    | "grpo" | sigma, the group's standard deviation | GRPO |
    | "dr-grpo" | 1 | Dr. GRPO, RLOO, ReMax |
    | "maxrl" | mu, the group's mean | MaxRL |
    | "batch" | standard deviation of R - mu over the batch | REINFORCE++ with a baseline |
    | "mean-abs" | mean of abs(R - mu) over the group | DGPO |
    | "mad" | median of abs(R - median) over the group, + 0.001 | MC-GRPO |
    | "beta" | density at mu of a Beta distribution fitted to the means of the batch | BNPO |

    Args:
      rewards: [P,K].
      rule: one of the above, or a positive number.
      mask: [P,K] the valid responses; None means all. Rewards of the others may be NaN or inf.
      ddof: 0 divides the variances of "grpo" and "batch" by K, 1 by K - 1. UNCERTAIN in the paper: the text has
        sigma = sqrt(mu (1 - mu)), which means 0; the verl code of its experiments has 1. At K = 8, they differ by 7%.
      floor: lower bound of tau. If the mean of a group is not above it, "maxrl" sets tau to 1, as in Dr. GRPO. (MaxRL
        is defined for rewards >= 0, whose mean is 0 only in a group without signal.)

    Returns:
      [P,1], finite and positive whatever the rewards are.

    Raises:
      ValueError: `rule` is neither a known name nor a positive finite number.

    References:
      LPO, arXiv 2605.06139, tables 1 and 2; public code of MC-GRPO, BNPO and MathForge (DGPO).
    """
    rewards = as_float(rewards)
    mask = as_mask(mask, rewards)
    problem = temperature_problem(rule)
    if problem:
        raise ValueError(f"temperature: {problem}")
    if rule == "maxrl":
        mu = masked_mean(rewards, mask, -1, keepdims=True)
        return jnp.where(mu > floor, mu, 1)
    if rule in SCALES:
        scale = jnp.maximum(SCALES[rule](rewards, mask, ddof), floor)
        return jnp.broadcast_to(scale, rewards[..., :1].shape)
    return jnp.full_like(rewards[..., :1], rule if is_number(rule) else 1)  # "dr-grpo"


def _batch_std(rewards: jax.Array, mask: jax.Array, ddof: int) -> jax.Array:
    return masked_std(centred(rewards, mask).reshape(1, -1), mask.reshape(1, -1), ddof)


def _mean_abs(rewards: jax.Array, mask: jax.Array, ddof: int) -> jax.Array:
    return masked_mean(jnp.abs(centred(rewards, mask)), mask, -1, keepdims=True)


def _mad(rewards: jax.Array, mask: jax.Array, ddof: int) -> jax.Array:
    deviation = jnp.abs(jnp.where(mask, rewards - masked_median(rewards, mask), 0))
    mad = masked_median(deviation, mask)
    # If most rewards are equal, as binary ones often are, the MAD is 0, and 0.001 alone would give advantages of 1000.
    return jnp.where(mad > 0, mad, masked_mean(deviation, mask, -1, keepdims=True)) + 1e-3


def _beta_density(rewards: jax.Array, mask: jax.Array, ddof: int) -> jax.Array:
    """Fit by moments, and move a third of the way from the uniform density to the fit; rewards should lie in [0, 1]."""
    p = masked_mean(rewards, mask, -1, keepdims=True).clip(0, 1)  # [P,1]
    sampled = mask.any(-1, keepdims=True)
    m = masked_mean(p, sampled)
    v = jnp.square(masked_std(p.T, sampled.T, ddof=1))  # [1,1]
    # If all means are equal there is no variance to fit, so the density stays uniform; beyond a concentration of 1e4,
    # the float32 density is rounding error.
    nu = jnp.where(v > 0, (m * (1 - m) / jnp.where(v > 0, v, 1) - 1).clip(0, 1e4), 0)
    a, b = 1 + m * nu / 3, 1 + (1 - m) * nu / 3
    return jnp.exp(special.xlogy(a - 1, p) + special.xlog1py(b - 1, -p) - special.betaln(a, b))


# name -> (rewards [P,K], mask [P,K], ddof) -> [P,1] or [1,1], before the floor is applied
SCALES: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {
    "grpo": masked_std,
    "batch": _batch_std,
    "mean-abs": _mean_abs,
    "mad": _mad,
    "beta": _beta_density,
}
TEMPERATURES = ("grpo", "dr-grpo", "maxrl", *(word for word in SCALES if word != "grpo"))


def temperature_problem(rule: object) -> str | None:
    """Describe in one line what is wrong with a temperature rule, or None."""
    if isinstance(rule, str):
        if rule in TEMPERATURES:
            return None
    elif is_number(rule) and 0 < rule < math.inf:
        return None
    known = ", ".join(map(repr, TEMPERATURES))
    return f"must be {known} or a positive number, got {rule!r}{did_you_mean(rule, TEMPERATURES)}"


def target_log_probs(
    rewards: ArrayLike, temperature: ArrayLike, anchor: ArrayLike | None = None, mask: ArrayLike | None = None
) -> jax.Array:
    """Return log w* of the Gibbs target w* = softmax(R / tau + s_t), the maximiser of <w, R> - tau KL(w || P_t).

    Args:
      rewards: [P,K]. Only their differences within a group matter.
      temperature: tau, a number or [P,1], in units of reward. As it tends to 0, the target tends to P_t restricted to
        the best responses; as it tends to infinity, to P_t.
      anchor: [P,K] s_t = log pi_t(y_k) - log pi_b(y_k), the scores at the start of the update; None means 0, which is
        the case in every run of `lpo train` (see `Scored.anchor_logp`).
      mask: [P,K] the valid responses; None means all. Rewards of the others may be NaN or inf.

    Returns:
      [P,K], -inf where invalid. A group of equal rewards gives exactly log P_t.

    Raises:
      ValueError: the temperature is an array [P], which would broadcast as one tau per response.

    References:
      LPO, arXiv 2605.06139, theorem 1, equation 8.
    """
    rewards, tau = as_float(rewards), as_float(temperature)
    mask = as_mask(mask, rewards)
    if tau.ndim not in (0, rewards.ndim):
        raise ValueError(
            f"temperature: expected a number or [P,1] beside rewards {rewards.shape}, got {tau.shape}"
        )
    # Subtract the best reward before dividing, so that equal rewards give exactly 0 for every tau.
    top = jnp.where(mask, rewards, -jnp.inf).max(-1, keepdims=True)
    tau = jnp.maximum(tau, np.finfo(np.float32).tiny)
    logits = jnp.maximum(jnp.where(mask, rewards - top, 0) / tau, -HUGE)
    return listwise_log_probs(logits if anchor is None else logits + as_float(anchor), mask)


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


# Every target is w* = argmax <w, u> - D(w, P_t) over the simplex: softmax for a KL, entmax and sparsemax for a Bregman
# divergence under which w can reach 0, and one-hot for D = 0. D is scaled so that all targets agree at a high
# temperature: on-policy, w* = (1 + u - mean u) / K. So a temperature has the same meaning for all.
# word -> (u [P,K] = R / tau up to a constant, s_t [P,K] or None, valid [P,K]) -> log w* [P,K], -inf where w* is 0
TARGETS: dict[str, Callable[[jax.Array, jax.Array | None, jax.Array], jax.Array]] = {
    "softmax": gibbs_log_probs,
    "entmax": entmax_log_probs,
    "sparsemax": sparsemax_log_probs,
    "one-hot": one_hot_log_probs,
}
