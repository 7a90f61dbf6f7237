"""Trust-region gates on the few tokens that reduce the entropy most: those of high covariance.

The change of a policy's entropy in an update is minus the covariance of log-prob and advantage. The contribution of
one token is (A - mean A)(log pi - mean log pi), with means over the tokens of the minibatch. These gates select tokens
by it.

References:
  The Entropy Mechanism of Reinforcement Learning, arXiv 2505.22617; verl, `compute_policy_loss_clip_cov` and
  `compute_policy_loss_kl_cov`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context
from lpo_jax.objectives.simplex import as_float, masked_mean
from lpo_jax.objectives.trust import Gate, RatioClip, implied_advantage, magnitude, ratio


def covariance(c: jax.Array, context: Context) -> jax.Array:
    """Return each token's part [P,K,T] of the covariance of advantage and log-prob; 0 outside the tokens."""
    tokens = context.tokens
    A = jnp.where(tokens, implied_advantage(c, context), 0)
    logp = jnp.where(tokens, as_float(context.stats.logp), 0)
    return jnp.where(tokens, (A - masked_mean(A, tokens)) * (logp - masked_mean(logp, tokens)), 0)


def first_in_order(count: jax.Array, order: jax.Array, candidates: jax.Array) -> jax.Array:
    """Return which candidates are among the `count` first in `order`: bool, in the shape of `order`."""
    place = jnp.argsort(jnp.argsort(jnp.where(candidates, order, jnp.inf).ravel())).reshape(order.shape)
    return candidates & (place < count)


@dataclasses.dataclass(frozen=True)
class ClipCov(RatioClip):
    """PPO's surrogate, without gradient on a few tokens whose covariance lies in a range.

    The public code draws these tokens at random. Here a hash of each token's log-prob selects them, so that the
    objective stays a pure function and the choice does not depend on the position in the minibatch. If there are no
    more candidates than tokens to select, both versions take all of them.

    Attributes:
      cov_low, cov_high: the range of covariance.
      cov_fraction: tokens without gradient, as a share of the minibatch's tokens; at least one.
    """

    cov_low: float = 1.0
    cov_high: float = 5.0
    cov_fraction: float = 2e-4

    def silent(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        """Return the tokens [P,K,T] that get no gradient, bool."""
        rho, cov = ratio(delta), covariance(c, context)
        shut = c * self.clipped(rho) > c * rho
        candidates = context.tokens & (cov > self.cov_low) & (cov < self.cov_high) & ~shut
        count = jnp.maximum(jnp.floor(self.cov_fraction * context.tokens.sum()), 1)
        return first_in_order(count, _hash(context.stats.logp), candidates)

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        return jnp.where(self.silent(delta, c, context), 0, super().__call__(delta, c, context))


@dataclasses.dataclass(frozen=True)
class KLCov(Gate):
    """phi = c rho, plus cov_kl_coef |delta| / K on the tokens of the highest covariance.

    Attributes:
      cov_fraction: tokens with the penalty, as a share of the minibatch's tokens; at least one.
      cov_kl_coef: weight of the penalty.
    """

    cov_fraction: float = 2e-4
    cov_kl_coef: float = 1.0

    def __call__(self, delta: jax.Array, c: jax.Array, context: Context) -> jax.Array:
        count = jnp.maximum(jnp.floor(self.cov_fraction * context.tokens.sum()), 1)
        held = first_in_order(count, -covariance(c, context), context.tokens)
        price = self.cov_kl_coef * magnitude(delta) / context.size[..., None]
        return c * ratio(delta) + jnp.where(held, price, 0)


def _hash(x: jax.Array) -> jax.Array:
    """Return a pseudo-random number for each float32 of `x`; equal inputs give equal numbers."""
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32)
    order: jax.Array = ((bits * jnp.uint32(2654435761)) >> 8).astype(
        jnp.float32
    )  # Knuth's multiplicative hash
    return order
