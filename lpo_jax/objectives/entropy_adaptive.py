"""HAPO: the entropy at a token scales its advantage and its trust region.

References:
  HAPO, public code starriver030515/HAPO (a fork of verl).
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.advantage import Utility, scaled
from lpo_jax.objectives.batch import Context, Field, required
from lpo_jax.objectives.simplex import as_float
from lpo_jax.objectives.trust import RatioClip, ratio
from lpo_jax.objectives.weights import TokenWeight


def relative_entropy(context: Context, pivot: float) -> jax.Array:
    """Return h [P,K,T], linear in the log entropy: 1 at its maximum, 0 at its `pivot` quantile, -1 at its minimum.

    Maximum, quantile and minimum are over the tokens of the minibatch.

    The public code divides the values below the pivot by their minimum, which is negative, so its h is never negative
    and its branches for low-entropy tokens never run. Here these branches do what the paper says.
    """
    tokens = context.tokens
    log_entropy = jnp.log(jnp.maximum(jnp.where(tokens, as_float(required(context.stats.entropy)), 1), 1e-8))
    middle = jnp.nanquantile(jnp.where(tokens, log_entropy, jnp.nan), pivot, method="nearest")
    h = jnp.where(tokens, log_entropy - middle, 0)
    far = jnp.where(h > 0, h.max(initial=0), -h.min(initial=0))
    return h / jnp.where(far > 0, far, 1)


def _widths(h: jax.Array, growth: float) -> tuple[jax.Array, jax.Array]:
    """Return the factors of the lower and the upper clip width: wider below if h < 0, wider above if h > 0."""
    return 1 - growth * jnp.minimum(h, 0), 1 + growth * jnp.maximum(h, 0)


@dataclasses.dataclass(frozen=True)
class TokenLevelUtility(Utility):
    """u = (R - mu) / tau with mean and deviation over the tokens of the group, so that long responses count more.

    Only the temperature "grpo" becomes the deviation over tokens; the others are unchanged. A group in which some |u|
    would reach `most_utility` uses the statistics over its responses instead.

    Attributes:
      most_utility: bound of |u| above which statistics over tokens are not used.
    """

    most_utility: float = 5.0

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        u, tau = super().__call__(context)
        share = context.lengths / jnp.maximum(context.lengths.sum(-1, keepdims=True), 1)
        # Computed from differences to the plain mean, so that equal rewards give exactly 0.
        difference = self.difference(context)
        difference = difference - (share * difference).sum(-1, keepdims=True)
        deviation = tau
        if self.temperature == "grpo":
            deviation = jnp.sqrt((share * jnp.square(difference)).sum(-1, keepdims=True))
            deviation = jnp.maximum(deviation, self.temperature_floor)
        by_token = jnp.where(context.valid, scaled(difference, deviation), 0)
        trusted = (jnp.abs(by_token) < self.most_utility).all(-1, keepdims=True)
        return jnp.where(trusted, by_token, u), jnp.where(trusted, deviation, tau)


@dataclasses.dataclass(frozen=True)
class EntropyClip(RatioClip):
    """PPO's clip, wider below for tokens of low entropy and wider above for tokens of high entropy.

    The widths are low (1 - g min(h, 0)) and high (1 + g max(h, 0)), with h from `relative_entropy`.

    Attributes:
      entropy_pivot: quantile of the entropy at which h is 0.
      clip_growth: g.
    """

    entropy_pivot: float = 0.8
    clip_growth: float = 1.0
    reads = (Field.ENTROPY,)

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        low, high = _widths(relative_entropy(context, self.entropy_pivot), self.clip_growth)
        rho = ratio(delta)
        clipped = jnp.clip(rho, 1 - self.epsilon_low * low, 1 + self.epsilon_high * high)
        return self.pessimistic(rho, clipped, c)


@dataclasses.dataclass(frozen=True)
class EntropyWeight(TokenWeight):
    """1 + g h on tokens of high entropy that have moved and of low entropy that have not, 1 on the others.

    A token has moved if its ratio is outside the inner half of `EntropyClip`'s range.

    Attributes:
      epsilon_low, epsilon_high, entropy_pivot, clip_growth: as in `EntropyClip`.
      weight_growth: g.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    entropy_pivot: float = 0.8
    clip_growth: float = 1.0
    weight_growth: float = 1.0
    reads = (Field.ENTROPY,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        h = relative_entropy(context, self.entropy_pivot)
        low, high = _widths(h, self.clip_growth)
        rho = ratio(context.delta)
        moved = (rho <= 1 - self.epsilon_low * low / 2) | (rho >= 1 + self.epsilon_high * high / 2)
        return jnp.where((h > 0) == moved, 1 + self.weight_growth * h, 1)
