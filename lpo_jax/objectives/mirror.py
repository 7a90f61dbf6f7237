"""GBMPO: penalties that are Bregman divergences of the sampled token's probability, with a fixed or learnt mirror map.

D_h(q || q0) = h(q) - h(q0) - h'(q0) (q - q0) for q = pi_theta(token), q0 = pi_ref(token) and a convex function h, the
mirror map. It replaces GRPO's KL to the reference. `lpo meta` learns a mirror map.

The learnable map is a sum of 126 units with six increasing activations and nonnegative weights:

    h'(y) = sum_j v_j act_j(w_j y + b_j) + a y + c log y

The public code integrates each unit and subtracts, which in float32 loses the divergence to rounding, because the
integrals are up to 1 / w times larger. Here the divergence of each unit is computed as (q - q0)^2 times a positive
factor, so that it is 0 at q = q0 and never negative.

References:
  GBMPO, arXiv 2602.04380; public code Lexsi-Labs/aligntune (backends/trl/rl/gbmpo, neural_mirror_grpo).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.objectives.batch import Context, Field, TokenStats, required
from lpo_jax.objectives.checks import is_number
from lpo_jax.objectives.regular import Regular, reference_log_ratio
from lpo_jax.objectives.simplex import as_float

UNITS = 126  # 6 activations, 21 units each
SIZE = 3 * UNITS + 2  # v, w, b of each unit, a, c
INIT_SCALE = 0.01
LEAST_LOG_PROB = math.log(1e-10)


@dataclasses.dataclass(frozen=True)
class Bregman(Regular):
    """(log pi_theta - log pi_ref)^2, in the space of log-probs (L2-GRPO). It is the base class of the others.

    Attributes:
      mirror_coef: its weight in the loss; 0 switches it off.
    """

    mirror_coef: float = 1e-4
    metric = "lpo/bregman"
    reads = (Field.REF_LOGP,)

    @property
    def coefficient(self) -> float:
        return self.mirror_coef

    def __call__(self, stats: TokenStats, context: Context) -> jax.Array:
        return jnp.square(reference_log_ratio(stats, context))


@dataclasses.dataclass(frozen=True)
class ProbL2(Bregman):
    """(q - q0)^2, in the space of probabilities (ProbL2-GRPO)."""

    def __call__(self, stats: TokenStats, context: Context) -> jax.Array:
        log_q, log_q0 = _log_probs(stats, context)
        return jnp.square(jnp.exp(log_q) - jnp.exp(log_q0))


@dataclasses.dataclass(frozen=True)
class NeuralMirror(Bregman):
    """The divergence of the learnable map (NM-GRPO).

    Attributes:
      mirror: its 380 parameters in the order of `split_map`; in a config, the path of a file that `lpo meta` wrote. If
        empty, they are drawn at random.
      mirror_seed: seed of this draw.
    """

    mirror: tuple[float, ...] = ()
    mirror_seed: int = 42

    def __call__(self, stats: TokenStats, context: Context) -> jax.Array:
        parameters = jnp.asarray(self.mirror or initial_map(self.mirror_seed), as_float(stats.logp).dtype)
        return map_divergence(parameters, *_log_probs(stats, context))


def _log_probs(stats: TokenStats, context: Context) -> tuple[jax.Array, jax.Array]:
    """Return log q and log q0 [P,K,T], both 0 outside the tokens; the reference is a constant."""
    log_ref = jax.lax.stop_gradient(required(stats.ref_logp))
    log_q, log_q0 = (jnp.where(context.tokens, as_float(x), 0) for x in (stats.logp, log_ref))
    return log_q, log_q0


@functools.cache
def initial_map(seed: int) -> tuple[float, ...]:
    """Return parameters drawn uniformly from [0, 0.01)."""
    return tuple((INIT_SCALE * np.random.default_rng(seed).random(SIZE)).tolist())


def map_problem(value: object) -> str | None:
    """Describe in one line what is wrong with the parameters of a map, or None."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in (0, SIZE):
        return f"must be {SIZE} numbers, or the path of a file that `lpo meta` wrote"
    good = all(is_number(x) and 0 <= x < math.inf for x in value)
    return None if good else "must hold finite numbers that are not negative, or h is not convex"


def split_map(parameters: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split parameters [380] into v, w, b of the units [21,3,6] (the last axis is the activation), a and c."""
    units = parameters[: 3 * UNITS].reshape(3, len(ACTIVATIONS), -1)
    return jnp.moveaxis(units, -1, 0), parameters[-2], parameters[-1]


def map_slope(parameters: jax.Array, log_y: jax.Array) -> jax.Array:
    """Return h'(y) at y = exp(log_y), probabilities of any shape, clipped to at least 1e-10."""
    units, a, c = split_map(parameters)
    log_y = jnp.maximum(log_y, LEAST_LOG_PROB)
    y = jnp.exp(log_y)

    def add(total: jax.Array, unit: jax.Array) -> tuple[jax.Array, None]:
        v, w, b = unit
        return total + sum(v[i] * act(w[i] * y + b[i]) for i, (act, _) in enumerate(ACTIVATIONS)), None

    return jax.lax.scan(add, a * y + c * log_y, units)[0]


def map_divergence(parameters: jax.Array, log_q: jax.Array, log_q0: jax.Array) -> jax.Array:
    """Return D_h(q || q0) of probabilities given by their logs, of any shape, clipped to at least 1e-10.

    It is differentiable once, with respect to `log_q` only: dD / dq = h'(q) - h'(q0).

    Args:
      parameters: [380], nonnegative.
      log_q, log_q0: log-probs of the same shape.
    """
    moving = jnp.exp(jnp.maximum(log_q, LEAST_LOG_PROB))
    log_q, log_q0 = (jnp.maximum(jax.lax.stop_gradient(x), LEAST_LOG_PROB) for x in (log_q, log_q0))
    q, q0 = jnp.exp(log_q), jnp.exp(log_q0)
    units, a, c = split_map(parameters)

    def add(total: jax.Array, unit: jax.Array) -> tuple[jax.Array, None]:
        v, w, b = unit
        curves = (
            v[i] * w[i] * curve(w[i] * q + b[i], w[i] * q0 + b[i]) for i, (_, curve) in enumerate(ACTIVATIONS)
        )
        return total + sum(curves), None

    curvature = jax.lax.scan(add, jnp.full_like(q, a / 2), units)[0]
    ratio = log_q - log_q0
    entropic = q * jnp.square(ratio) * _exp_curve(-ratio)  # q log(q / q0) - (q - q0)
    value = curvature * jnp.square(q - q0) + c * entropic
    # A closed-form gradient: autodiff would store several numbers per unit and token.
    slope = map_slope(parameters, log_q) - map_slope(parameters, log_q0)
    return value + slope * (moving - jax.lax.stop_gradient(moving))


# A unit's divergence is w (q - q0)^2 curve(u, u0), where u = w q + b and curve is
# (F(u) - F(u0) - F'(u0) (u - u0)) / (u - u0)^2 for the primitive F of its activation.


def _roots(u: jax.Array, u0: jax.Array, power: float) -> tuple[jax.Array, jax.Array]:
    # 1 / sqrt(u) is infinite at u = 0, which occurs only for a unit with w = b = 0, whose divergence is 0.
    return jnp.maximum(u, 1e-12) ** power, jnp.maximum(u0, 1e-12) ** power


def _sqrt_curve(u: jax.Array, u0: jax.Array) -> jax.Array:
    x, x0 = _roots(u, u0, 1 / 2)
    return (2 * x + x0) / (3 * jnp.square(x + x0))


def _cbrt_curve(u: jax.Array, u0: jax.Array) -> jax.Array:
    x, x0 = _roots(u, u0, 1 / 3)
    return (3 * x * x + 2 * x * x0 + x0 * x0) / (4 * jnp.square(x * x + x * x0 + x0 * x0))


def _exp_curve(d: jax.Array) -> jax.Array:
    """Return (e^d - 1 - d) / d^2, by its power series where the difference would be rounding error."""
    near = jnp.abs(d) < 0.5
    series = jnp.zeros_like(d)
    for n in range(12, 1, -1):
        series = series * d + 1 / math.factorial(n)
    far = jnp.where(near, 1, d)
    return jnp.where(near, series, (jnp.expm1(far) - far) / jnp.square(far))


LOG_SHIFT = 1e-3


def _log_curve(u: jax.Array, u0: jax.Array) -> jax.Array:
    """Return the curve of log(u + 1e-3): ((u + e) x - (u - u0)) / (u - u0)^2, with x = log((u + e) / (u0 + e))."""
    x = jnp.log1p((u - u0) / (u0 + LOG_SHIFT))
    # x / (u - u0), where u - u0 = (u0 + e) (e^x - 1).
    rate = 1 / ((u0 + LOG_SHIFT) * (1 + x * _exp_curve(x)))
    return (u + LOG_SHIFT) * jnp.square(rate) * _exp_curve(-x)


# (activation of u, its curve), in the order of the units
ACTIVATIONS: tuple[
    tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array, jax.Array], jax.Array]], ...
] = (
    (lambda u: u**3, lambda u, u0: (u * u + 2 * u * u0 + 3 * u0 * u0) / 4),
    (jnp.square, lambda u, u0: (u + 2 * u0) / 3),
    (jnp.sqrt, _sqrt_curve),
    (jnp.cbrt, _cbrt_curve),
    (lambda u: jnp.log(u + LOG_SHIFT), _log_curve),
    (jnp.exp, lambda u, u0: jnp.exp(u0) * _exp_curve(u - u0)),
)
