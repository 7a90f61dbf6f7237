"""The response simplex: scores of K responses, their softmax, and statistics that ignore invalid entries.

Every function masks with `where` before it does arithmetic, so a NaN or inf in an invalid entry affects neither the
value nor the gradient.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

SCORES = ("mean", "sum")


def as_float(x: ArrayLike) -> jax.Array:
    """Return `x` in float32, or in float64 if it is float64 already."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_mask(mask: ArrayLike | None, like: jax.Array) -> jax.Array:
    """Return `mask` as bool in the shape of `like`; None means every entry."""
    if mask is None:
        return jnp.ones(like.shape, bool)
    return jnp.broadcast_to(jnp.asarray(mask) != 0, like.shape)


def masked_mean(
    x: ArrayLike, mask: ArrayLike, axis: int | tuple[int, ...] | None = None, keepdims: bool = False
) -> jax.Array:
    """Return the mean of `x` where `mask`, over `axis` (None: all axes); 0 where no entry is valid."""
    x = as_float(x)
    mask = as_mask(mask, x)
    count = jnp.maximum(mask.sum(axis, keepdims=True), 1)
    # Divide before summing: the sum of K rewards near the largest float would overflow.
    return (jnp.where(mask, x, 0) / count).sum(axis, keepdims=keepdims)


def centred(x: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Return `x` [P,K] minus its mean over the valid responses; 0 where invalid.

    The maximum is subtracted first, so a group of equal values gives exactly 0 and not a rounding error, which a small
    temperature would amplify.
    """
    x = as_float(x)
    mask = as_mask(mask, x)
    top = jnp.where(mask, x, -jnp.inf).max(-1, keepdims=True)
    below = jnp.where(mask, x - top, 0)
    return jnp.where(mask, below - masked_mean(below, mask, -1, keepdims=True), 0)


def masked_std(x: ArrayLike, mask: ArrayLike | None = None, ddof: int = 0) -> jax.Array:
    """Return the standard deviation [P,1] of `x` [P,K] over the valid responses; 0 for `ddof` or fewer of them."""
    x = as_float(x)
    mask = as_mask(mask, x)
    deviation = centred(x, mask)
    # Scale to 1 before squaring: the square of a reward of 1e30 is inf in float32.
    largest = jnp.abs(deviation).max(-1, keepdims=True)
    unit = deviation / jnp.where(largest > 0, largest, 1)
    count = mask.sum(-1, keepdims=True)
    return largest * jnp.sqrt(jnp.square(unit).sum(-1, keepdims=True) / jnp.maximum(count - ddof, 1))


def masked_median(x: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Return the median [P,1] of `x` [P,K] over the valid responses, the midpoint of two middle values; 0 for none."""
    x = as_float(x)
    mask = as_mask(mask, x)
    ordered = jnp.sort(jnp.where(mask, x, jnp.inf), -1)
    count = mask.sum(-1, keepdims=True)
    middle = jnp.concatenate([jnp.maximum(count - 1, 0) // 2, count // 2], -1)
    # Halve before adding: the sum of two rewards near the largest float would overflow.
    halves = jnp.take_along_axis(ordered, middle, -1) / 2
    return jnp.where(count > 0, halves.sum(-1, keepdims=True), 0)


def sequence_scores(log_ratio: ArrayLike, mask: ArrayLike, score: str = "mean") -> jax.Array:
    """Return the scores s_k [P,K] of the responses, in nats, from token log-ratios.

    Args:
      log_ratio: [P,K,T] log pi_theta - log pi_b of each token.
      mask: [P,K,T] the response tokens.
      score: "mean" over the tokens of a response, or "sum". UNCERTAIN in the paper: equation 3 defines the
        length-normalised log-prob, so "mean" (about 95% sure); section 2.1 writes the product, so "sum".

    Returns:
      [P,K]; 0 for a response without tokens.

    References:
      LPO, arXiv 2605.06139, equations 3 and 4.
    """
    log_ratio = as_float(log_ratio)
    mask = as_mask(mask, log_ratio)
    total = jnp.where(mask, log_ratio, 0).sum(-1)
    return total if score == "sum" else total / jnp.maximum(mask.sum(-1), 1)


def listwise_log_probs(scores: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Return log P_theta, the log softmax of `scores` over the valid responses of each group.

    Args:
      scores: [P,K] s_k = log pi_theta(y_k) - log pi_b(y_k), in nats. On-policy, they are 0 and P is uniform.
      mask: [P,K] the valid responses; None means all.

    Returns:
      [P,K] in float32 (float64 for float64 input). It is -inf where invalid, so that `exp` gives 0 there; a group
      without a valid response is all -inf. The gradient is finite everywhere and 0 where invalid.

    References:
      LPO, arXiv 2605.06139, equation 4.
    """
    scores = as_float(scores)
    mask = as_mask(mask, scores)
    # An empty group is normalised over its zeroed entries and then masked, because a softmax over nothing is NaN.
    empty = ~mask.any(-1, keepdims=True)
    log_p = jax.nn.log_softmax(jnp.where(mask, scores, 0), axis=-1, where=mask | empty)
    return jnp.where(mask, log_p, -jnp.inf)
