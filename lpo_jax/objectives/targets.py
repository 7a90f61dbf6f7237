"""From rewards to a target on the simplex: the temperature that a method implies, and the Gibbs target."""

import math
import numbers

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lpo_jax.objectives.hints import nearest
from lpo_jax.objectives.simplex import as_float, as_mask, centred, listwise_log_probs, masked_mean, masked_std

TEMPERATURES = ("grpo", "dr-grpo", "maxrl")
TEMPERATURE_FLOOR = 1e-6

# Stands for infinity in R / tau: far beyond any real logit, and K of them still sum to a finite float32.
HUGE = 1e30


def temperature(
    rewards: ArrayLike,
    rule: str | float,
    mask: ArrayLike | None = None,
    *,
    ddof: int = 0,
    floor: float = TEMPERATURE_FLOOR,
) -> jax.Array:
    """The temperature tau of each group, in units of reward: what a method divides its advantage by.

    Args:
      rewards: [P,K].
      rule: "grpo" (sigma, the group's standard deviation), "dr-grpo" (1), "maxrl" (mu, the group's mean), or
        a positive number.
      mask: [P,K] the valid responses; None means all. Rewards of the others may be NaN or inf.
      ddof: 0 divides the variance by K, 1 by K - 1. UNCERTAIN in the paper: the text has
        sigma = sqrt(mu (1 - mu)), so 0; the verl code it was run in has 1. At K = 8 they differ by 7%.
      floor: least sigma. A mean at or below it has no scale to give: tau is 1 there, as in Dr. GRPO (MaxRL is
        defined for rewards >= 0, whose mean is 0 only in a group without signal).

    Returns:
      [P,1], finite and positive whatever the rewards.

    Raises:
      ValueError: `rule` is neither a known name nor a positive finite number.

    References:
      LPO, arXiv 2605.06139, tables 1 and 2.
    """
    rewards = as_float(rewards)
    mask = as_mask(mask, rewards)
    if rule == "grpo":
        return jnp.maximum(masked_std(rewards, mask, ddof), floor)
    if rule == "maxrl":
        mu = masked_mean(rewards, mask, -1, keepdims=True)
        return jnp.where(mu > floor, mu, 1)
    if rule == "dr-grpo":
        rule = 1.0
    problem = temperature_problem(rule)
    if problem:
        raise ValueError(f"temperature: {problem}")
    return jnp.full_like(rewards[..., :1], rule)


def temperature_problem(rule: object) -> str | None:
    """One line that says what is wrong with a temperature rule, or None."""
    if isinstance(rule, str):
        if rule in TEMPERATURES:
            return None
    elif isinstance(rule, numbers.Real) and not isinstance(rule, bool) and 0 < rule < math.inf:
        return None
    known = ", ".join(map(repr, TEMPERATURES))
    return f"must be {known} or a positive number, got {rule!r}{nearest(rule, TEMPERATURES)}"


def advantages(rewards: ArrayLike, temperature: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """A = (R - mu) / tau [P,K], in units of tau; 0 where invalid, exactly 0 in a group of equal rewards."""
    return jnp.clip(centred(rewards, mask) / as_float(temperature), -HUGE, HUGE)


def target_log_probs(
    rewards: ArrayLike,
    temperature: ArrayLike,
    anchor: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Log of the Gibbs target w* = softmax(R / tau + s_t), the maximiser of <w, R> - tau KL(w || P_t).

    Args:
      rewards: [P,K]. Only their differences inside a group matter.
      temperature: tau, a number or [P,1], in units of reward. Towards 0 the target is the best responses
        alone (by P_t among ties); towards infinity it is P_t.
      anchor: [P,K] s_t = log pi_t(y_k) - log pi_b(y_k), the scores at the start of the update; None means 0.
      mask: [P,K] the valid responses; None means all. Rewards of the others may be NaN or inf.

    Returns:
      [P,K] -inf where invalid. A group of equal rewards gives exactly log P_t.

    Raises:
      ValueError: the temperature is an array [P], which would be read as one tau a response.

    References:
      LPO, arXiv 2605.06139, theorem 1, equation 8.
    """
    rewards, tau = as_float(rewards), as_float(temperature)
    mask = as_mask(mask, rewards)
    if tau.ndim not in (0, rewards.ndim):
        raise ValueError(
            f"temperature: expected a number or [P,1] beside rewards {rewards.shape}, got {tau.shape}"
        )
    # The best reward is taken off before dividing: then equal rewards give exactly 0 whatever tau.
    top = jnp.where(mask, rewards, -jnp.inf).max(-1, keepdims=True)
    tau = jnp.maximum(tau, jnp.finfo(jnp.float32).tiny)
    logits = jnp.maximum(jnp.where(mask, rewards - top, 0) / tau, -HUGE)
    return listwise_log_probs(logits if anchor is None else logits + as_float(anchor), mask)
