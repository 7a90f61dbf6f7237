"""The next-token distribution that is sampled from, and its random numbers.

Axes: P prompts · K responses · R rows (P K flattened) · V vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p, then min-p, in the order of transformers and vLLM.

    Attributes:
      temperature: divides the logits. 0 is greedy: the most probable token is taken, and its log-prob is the one at
        temperature 1, because that under a point mass carries no information.
      top_k: number of most probable tokens to keep; 0: off.
      top_p: keep the smallest set of most probable tokens whose probability reaches this value (nucleus sampling);
        1: off.
      min_p: keep tokens of at least this probability relative to the most probable one; 0: off.

    Raises:
      UserError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"sampling: temperature {self.temperature}: need a finite number that is not negative; 0 is "
                "greedy, 1 the model's own distribution"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1:
            raise UserError(
                f"sampling: top_k {self.top_k}, top_p {self.top_p}, min_p {self.min_p}: "
                "need top_k >= 0 (0 is off), 0 < top_p <= 1, 0 <= min_p < 1"
            )

    def logits(self, logits: jax.Array) -> jax.Array:
        """Return the logits `[R, V]` of the distribution that is sampled from; removed tokens have -inf."""
        if self.temperature == 0:
            return logits
        logits = logits / self.temperature
        if self.top_k > 0:
            kth = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits >= kth, logits, -jnp.inf)
        if self.top_p < 1:
            logits = jnp.where(logits >= _nucleus_floor(logits, self.top_p), logits, -jnp.inf)
        if self.min_p > 0:
            floor = logits.max(axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits >= floor, logits, -jnp.inf)
        return logits

    def draw(self, keys: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draws one token per row.

        Args:
          keys: `[R]` random keys.
          logits: `[R, V]` float32 from the model.

        Returns:
          Tokens `[R]` int32, their log-probs `[R]` float32 under the distribution that is sampled from, and its
          entropies `[R]` float32 in nats.
        """
        logits = self.logits(logits)
        peak = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - peak)
        total = weights.sum(axis=-1)
        lse = jnp.log(total) + peak[:, 0]
        # Removed tokens have weight 0 and logit -inf, whose product is NaN. An einsum, because XLA's CPU compiler runs
        # the sum of a product along the last axis 20 times slower.
        finite = jnp.maximum(logits, jnp.finfo(logits.dtype).min)
        entropy = lse - jnp.einsum("rv,rv->r", weights, finite) / total
        tokens = jnp.argmax(logits, axis=-1) if self.temperature == 0 else _categorical(keys, weights)
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        return tokens.astype(jnp.int32), chosen - lse, entropy


def _nucleus_floor(logits: jax.Array, top_p: float) -> jax.Array:
    """Return the largest value `[R, 1]` such that the tokens with logits of at least it have probability `top_p`.

    Bisects the float32 numbers between -inf and the largest logit, in 32 passes over the logits. A sort of the
    vocabulary gives the same value and takes twenty times as long on a CPU: 1.1 s for 64 rows of V = 49152.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)

    def halve(_, bounds):
        low, high = bounds  # the floor is in [low, high)
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # low + high may overflow
        above = (logits >= _of_ordered(middle)[:, None]).astype(logits.dtype)
        enough = jnp.einsum("rv,rv->r", probabilities, above) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = _ordered(jnp.full(len(logits), -jnp.inf, jnp.float32))
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, _ordered(logits.max(axis=-1)) + 1))
    return _of_ordered(low)[:, None]


def _ordered(x: jax.Array) -> jax.Array:
    """Return integers in the order of the float32 numbers `x`: those of negative numbers have their bits inverted."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _of_ordered(bits: jax.Array) -> jax.Array:
    """Return the float32 numbers whose `_ordered` integers are `bits`."""
    return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), jnp.float32)


BLOCK = 256  # vocabulary entries per block of the inverse CDF
SHARDS = 16  # a large vocabulary has a multiple of so many blocks


def _categorical(keys: jax.Array, weights: jax.Array) -> jax.Array:
    """Draws tokens `[R]` in proportion to `weights [R, V]` by inverse CDF: a block of the vocabulary, then a token.

    This takes two uniform variables per row instead of V Gumbel variables: 1.5 ms instead of 85 ms for 64 rows of
    V = 49152 on two CPU cores, where the rest of a 135M model's decode step takes 180 ms. A large vocabulary may be
    split over devices. If its blocks did not divide over them, the compiler would gather half of the weights.
    """
    R, V = weights.shape
    divisor = BLOCK * SHARDS if V > BLOCK * SHARDS else BLOCK
    mass = jnp.pad(weights, ((0, 0), (0, -V % divisor))).reshape(R, -1, BLOCK)
    blocks = mass.sum(axis=-1)  # [R, V / BLOCK]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _inverse_cdf(blocks, uniform[:, 0])
    inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]  # [R, BLOCK]
    return block * BLOCK + _inverse_cdf(inside, uniform[:, 1])


def _inverse_cdf(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """Return the first index at which the cumulative sum of `mass [R, n]` exceeds `uniform [R]` times its total.

    An index of mass 0 is never returned.
    """
    cumulative = jnp.cumsum(mass, axis=-1)
    index = jnp.sum(cumulative <= uniform[:, None] * cumulative[:, -1:], axis=-1)
    # uniform * total may be rounded up to the total itself; only then is no index left.
    return jnp.where(index < mass.shape[-1], index, jnp.argmax(mass, axis=-1))


@functools.partial(jax.jit, static_argnums=3)
def row_keys(seed: jax.Array, step: jax.Array, prompt_ids: jax.Array, num_responses: int) -> jax.Array:
    """Return random keys `[P, K]` that depend on (seed, step, prompt id, k) alone.

    The position is folded in at each token. A row therefore draws the same tokens in any batch, on any number of
    devices, and before or after a resume.

    Args:
      seed: uint32 scalar.
      step: uint32, a scalar or `[P]`.
      prompt_ids: `[P]` uint32, one identity per prompt.
      num_responses: K.
    """
    fold = jax.random.fold_in

    def of_prompt(step, prompt):
        base = fold(fold(jax.random.key(seed), step), prompt)
        return jax.vmap(lambda k: fold(base, k))(jnp.arange(num_responses))

    return jax.vmap(of_prompt)(jnp.broadcast_to(step, prompt_ids.shape), prompt_ids)
