"""Reward shaping, biases and selection.

A shape changes the rewards before advantages are computed. A bias changes the advantages by something other than the
reward of the response itself. A selection leaves responses out.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, Field, required
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, masked_mean, masked_median, masked_std, sequence_scores
from lpo_jax.objectives.weights import RESPONSE_BUDGET


@dataclasses.dataclass(frozen=True)
class Shape(Part):
    """The base class."""

    def __call__(self, context: Context) -> jax.Array:
        """Return new rewards [P,K] from `context.rewards`; values of invalid responses are ignored."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Sign(Shape):
    """1 for a passing response, -1 for a failing one."""

    def __call__(self, context: Context) -> jax.Array:
        return jnp.where(context.passed, 1.0, -1.0)


@dataclasses.dataclass(frozen=True)
class FlawPenalty(Shape):
    """R minus a penalty for a passing response in which a judge found a wrong step.

    Attributes:
      flaw_penalty: in units of reward. With 1 and rewards of 1 and -1, the reward of a flawed pass is 0: its advantage
        becomes negative once the group has more clean passes than failures.

    References:
      FAPO, public code verl-recipe/fapo.
    """

    flaw_penalty: float = 1.0
    reads = (Field.FLAWED,)

    def __call__(self, context: Context) -> jax.Array:
        flawed = context.passed & (required(context.scored.flawed) != 0)
        return context.rewards - self.flaw_penalty * flawed


@dataclasses.dataclass(frozen=True)
class Overlong(Shape):
    """R minus a penalty that grows from 0 to 1 over a buffer before the token limit.

    Attributes:
      overlong_buffer: length of the buffer, as a share of `max_tokens` (the paper: 4096 of 20480).
      max_tokens: the response budget of the run.

    References:
      DAPO, arXiv 2503.14476, equation 13.
    """

    overlong_buffer: float = 0.2
    max_tokens: int = RESPONSE_BUDGET

    def __call__(self, context: Context) -> jax.Array:
        stretch = self.overlong_buffer * self.max_tokens
        return context.rewards - ((context.lengths - self.max_tokens) / stretch + 1).clip(0, 1)


@dataclasses.dataclass(frozen=True)
class ClusterFrequency(Shape):
    """The share of the group with the same final answer, which needs no labels; 0 for a response without an answer.

    Attributes:
      entropy_threshold: in nats. If the entropy of a group's answers is not below it, all rewards of the group are 0,
        because there is no majority.

    References:
      EMPO, arXiv 2504.05812; public code QingyangZhang/EMPO.
    """

    entropy_threshold: float = 1.0
    reads = (Field.CLUSTERS,)

    def __call__(self, context: Context) -> jax.Array:
        share, entropy = agreement(context)
        answered = required(context.scored.clusters) >= 0
        return jnp.where(answered & (entropy < self.entropy_threshold), share, 0)


@dataclasses.dataclass(frozen=True)
class RewardTiers(Shape):
    """1 for a passing response, plus a bonus that grows with the reward in steps.

    The steps remove differences that are too small to be meaningful, and keep the order: every pass gets more than
    every failure. UNCERTAIN: reconstructed; the paper defines its zones by task-specific distances, and its weight was
    not found.

    Attributes:
      tiers: number of steps in [0, 1].
      tier_weight: the bonus of the highest step.

    References:
      SSL (Sweet Spot Learning), from its abstract and reviews.
    """

    tiers: int = 4
    tier_weight: float = 0.5

    def __call__(self, context: Context) -> jax.Array:
        step = jnp.floor(context.rewards.clip(0, 1) * self.tiers) / self.tiers
        return context.passed + self.tier_weight * step


def agreement(context: Context) -> tuple[jax.Array, jax.Array]:
    """Measure how far the answers of each group agree, from `Scored.clusters`.

    Returns:
      share: [P,K] share of the valid responses that have the answer of this response, itself included. A response
        without an answer agrees with itself only.
      entropy: [P,1] entropy of the answers, in nats.
    """
    clusters = required(context.scored.clusters)
    same = (clusters[..., :, None] == clusters[..., None, :]) & (clusters[..., None] >= 0)
    same = (same | jnp.eye(clusters.shape[-1], dtype=bool)) & context.valid[..., None, :]
    share = jnp.where(context.valid, same.sum(-1) / context.size, 1)
    return share, -jnp.log(share).sum(-1, keepdims=True) / context.size


@dataclasses.dataclass(frozen=True)
class Bias(Part):
    """The base class."""

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        """Return new utilities [P,K] from utilities [P,K]; values of invalid responses are ignored."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ConfidenceGap(Bias):
    """u + a (c(q) - c(o)) in groups with a passing response: confident responses gain less.

    c(o) = exp(mean log-prob of the least likely tokens of the response) under the behaviour policy. c(q) is the same
    quantity of the prompt, `Scored.prompt_confidence`.

    Attributes:
      confidence_weight: a. UNCERTAIN: the paper's value was not found; the default is ours.
      unlikely_share: the share of a response's tokens that counts as least likely.

    References:
      ProGRPO, arXiv 2602.05281, advantage re-weighting, as third-party notes quote it.
    """

    confidence_weight: float = 0.3
    unlikely_share: float = 0.2
    reads = (Field.PROMPT_CONFIDENCE,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        logp = as_float(context.scored.behaviour_logp)
        ordered = jnp.sort(jnp.where(context.tokens, logp, jnp.inf), -1)
        few = jnp.ceil(self.unlikely_share * context.lengths)[..., None]
        confidence = jnp.exp(masked_mean(ordered, jnp.arange(logp.shape[-1]) < few, -1))
        gap = as_float(required(context.scored.prompt_confidence))[:, None] - confidence
        return u + jnp.where(context.pass_rate > 0, self.confidence_weight * gap, 0)


@dataclasses.dataclass(frozen=True)
class GlobalMix(Bias):
    """w u + (1 - w) g: if the answers of a group agree, the prompt is compared with the other prompts instead.

    g = (mu - mean of mu) / (standard deviation of mu) over the groups of the minibatch, and
    w = sigmoid(slope (H - middle)), where H is the entropy of the group's answers. So a group whose responses all fail
    or all pass in the same way still has a signal. UNCERTAIN: the paper's w was not found; this form and its numbers
    are ours.

    Attributes:
      mix_slope: in 1/nats.
      mix_entropy: the middle, in nats.

    References:
      COPO, arXiv 2508.04138, as third-party notes quote it.
    """

    mix_slope: float = 3.0
    mix_entropy: float = 1.0
    reads = (Field.CLUSTERS,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        mu = masked_mean(context.rewards, context.valid, -1, keepdims=True).T  # [1,P]
        sampled = context.valid.any(-1)[None]
        sigma = masked_std(mu, sampled)
        g = jnp.where(sampled, mu - masked_mean(mu, sampled), 0) / jnp.where(sigma > 0, sigma, 1)
        w = jax.nn.sigmoid(self.mix_slope * (agreement(context)[1] - self.mix_entropy))
        return w * u + (1 - w) * g.T


@dataclasses.dataclass(frozen=True)
class Select(Part):
    """The base class: which responses of the sampled groups are trained on.

    Advantages are computed on the groups as sampled, before the selection. So a selection can use them, and leaving a
    response out does not change the advantages of the others.
    """

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
        rise = self.responses_final - self.responses_initial
        share = self.responses_initial + required(context.scored.progress) * rise
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
