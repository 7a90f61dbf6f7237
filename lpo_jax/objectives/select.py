"""Selection: which responses of the sampled groups are trained on.

Advantages are computed on the groups as sampled, before the selection. So a selection can use them, and leaving a
response out does not change the advantages of the others.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, Field, required
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, masked_median, sequence_scores


@dataclasses.dataclass(frozen=True)
class Select(Part):
    """The base class."""

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        """Return the responses to keep, [P,K] bool; those outside `context.valid` are left out in any case.

        Args:
          context: the groups as sampled.
          u: [P,K] utilities, 0 where invalid.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MixedGroups(Select):
    """Keep the groups in which some responses pass and some do not.

    References:
      DAPO, arXiv 2503.14476, equation 11, without sampling further groups in place of the others.
    """

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        return jnp.broadcast_to((context.pass_rate > 0) & (context.pass_rate < 1), context.valid.shape)


@dataclasses.dataclass(frozen=True)
class DropMedian(Select):
    """Leave out one response at the median of its group: of an odd number K + 1 of samples, K are kept.

    A group of even size whose two middle rewards differ has no such response and keeps all.

    References:
      MC-GRPO, public code lotusroot-kim/MC-GRPO.
    """

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        middle = context.valid & (context.rewards == masked_median(context.rewards, context.valid))
        return ~(middle & (jnp.cumsum(middle, -1) == 1))


@dataclasses.dataclass(frozen=True)
class MaxVariance(Select):
    """Keep the subset of the minibatch's responses, of a given size, whose advantages have the largest variance.

    This subset is a prefix and a suffix of the sorted advantages, so every split into the two is tried. The size, a
    share of the responses, changes linearly over the run. UNCERTAIN: the paper's shares were not found; the defaults
    are ours.

    Attributes:
      responses_initial: share of the responses kept at the first step.
      responses_final: share kept at the last step.

    References:
      D3S, sample level, as third-party notes quote it. PODS (arXiv 2504.13818) does the same within each group.
    """

    responses_initial: float = 0.25
    responses_final: float = 0.75
    reads = (Field.PROGRESS,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        valid = context.valid.ravel()
        total = valid.sum()
        share = self.responses_initial + required(context.scored.progress) * (
            self.responses_final - self.responses_initial
        )
        keep = jnp.round(share * total).astype(int).clip(jnp.minimum(2, total), total)
        order = jnp.argsort(jnp.where(valid, u.ravel(), jnp.inf))  # the invalid come last
        # The scale does not change which variance is largest; with this one, squares do not overflow.
        x = jnp.where(valid, u.ravel(), 0)[order] / jnp.maximum(jnp.abs(u).max(initial=0), 1e-30)
        first, second = (jnp.cumsum(jnp.concatenate([jnp.zeros(1, x.dtype), y])) for y in (x, x * x))
        prefix = jnp.arange(x.size + 1)  # number of smallest values kept; the rest of `keep` are the largest
        suffix = jnp.minimum(total - keep + prefix, total)  # index at which the largest values begin
        sums = (s[prefix] + s[total] - s[suffix] for s in (first, second))
        mean, square = (s / jnp.maximum(keep, 1) for s in sums)
        split = jnp.argmax(jnp.where(prefix <= keep, square - mean * mean, -jnp.inf))
        rank = jnp.argsort(order)
        return ((rank < split) | (rank >= total - keep + split)).reshape(u.shape)


@dataclasses.dataclass(frozen=True)
class PerplexityMask(Select):
    """Leave out passing responses of high perplexity under the reference, and failing ones of low perplexity.

    Attributes:
      ppl_correct_max: largest perplexity, under the reference, of a response that passed.
      ppl_wrong_min: smallest perplexity of one that did not.

    References:
      CAPO (calibration), as third-party notes quote it.
    """

    ppl_correct_max: float = 2.5
    ppl_wrong_min: float = 1.05
    reads = (Field.REF_LOGP,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        perplexity = jnp.exp(-sequence_scores(as_float(required(context.stats.ref_logp)), context.tokens))
        return jnp.where(context.passed, perplexity <= self.ppl_correct_max, perplexity >= self.ppl_wrong_min)
