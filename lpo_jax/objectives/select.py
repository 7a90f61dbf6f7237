"""Selection: which responses of the sampled groups are learnt from.

Advantages are of the groups as sampled, so a selection may look at them, and leaving a response out does not
change what the others were compared to.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, required
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, masked_median, sequence_scores


@dataclasses.dataclass(frozen=True)
class Select(Part):
    """The base."""

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        """[P,K] bool, the responses to keep; those outside `context.valid` are left out anyway.

        Args:
          context: the groups as sampled.
          u: [P,K] their utilities, 0 where invalid.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MixedGroups(Select):
    """Groups in which some responses pass and some do not, whole.

    References:
      DAPO, arXiv 2503.14476, equation 11, without sampling others in their place.
    """

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        return jnp.broadcast_to((context.pass_rate > 0) & (context.pass_rate < 1), context.valid.shape)


@dataclasses.dataclass(frozen=True)
class DropMedian(Select):
    """All but one response at the median of its group: K of the K + 1 that were sampled when that is odd.

    An even group whose two middle rewards differ has no such response and keeps all.

    References:
      MC-GRPO, public code lotusroot-kim/MC-GRPO.
    """

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        middle = context.valid & (context.rewards == masked_median(context.rewards, context.valid))
        return ~(middle & (jnp.cumsum(middle, -1) == 1))


@dataclasses.dataclass(frozen=True)
class MaxVariance(Select):
    """The share of the minibatch's responses whose advantages have the largest variance: the extremes of all groups.

    Of a sorted list it is a prefix and a suffix, and every split is tried. The share grows in a straight line
    over the run. UNCERTAIN: the paper's shares were not found; the defaults are ours.

    Attributes:
      responses_initial: share of the responses kept at the first step.
      responses_final: share at the last.

    References:
      D3S, sample level, as a third party's notes quote it. PODS (arXiv 2504.13818) does it in each group.
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
        # The variance does not change with the unit; in this one squares are exact enough and cannot overflow.
        x = jnp.where(valid, u.ravel(), 0)[order] / jnp.maximum(jnp.abs(u).max(initial=0), 1e-30)
        first, second = (jnp.cumsum(jnp.concatenate([jnp.zeros(1, x.dtype), y])) for y in (x, x * x))
        prefix = jnp.arange(x.size + 1)  # how many of the smallest, the rest of `keep` being of the largest
        suffix = jnp.minimum(total - keep + prefix, total)  # where the largest begin
        sums = (s[prefix] + s[total] - s[suffix] for s in (first, second))
        mean, square = (s / jnp.maximum(keep, 1) for s in sums)
        split = jnp.argmax(jnp.where(prefix <= keep, square - mean * mean, -jnp.inf))
        rank = jnp.argsort(order)
        return ((rank < split) | (rank >= total - keep + split)).reshape(u.shape)


@dataclasses.dataclass(frozen=True)
class PerplexityMask(Select):
    """Without correct responses that the reference finds odd, and wrong ones that it finds all too natural.

    Attributes:
      ppl_correct_max: largest perplexity, under the reference, of a response that passed.
      ppl_wrong_min: smallest perplexity of one that did not.

    References:
      CAPO (calibration), as a third party's notes quote it.
    """

    ppl_correct_max: float = 2.5
    ppl_wrong_min: float = 1.05
    reads = (Field.REF_LOGP,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        perplexity = jnp.exp(-sequence_scores(as_float(required(context.stats.ref_logp)), context.tokens))
        return jnp.where(context.passed, perplexity <= self.ppl_correct_max, perplexity >= self.ppl_wrong_min)
