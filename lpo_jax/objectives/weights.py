"""Weights: of tokens in the loss (aggregation), factors of single tokens, and weights of prompts.

A `TokenWeight` is a factor of the coefficient of a response at each of its tokens. It multiplies the weights of the
aggregation, whose denominators still count all tokens. A `PromptWeight` weighs a prompt's group relative
to the others of the minibatch.
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, Field, required
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, centred, masked_mean

# The default of every `max_tokens` that means the response budget of the run. `lpo train` replaces it by that budget.
RESPONSE_BUDGET = 1024

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def token_weights(tokens: jax.Array, aggregation: str, max_tokens: int = RESPONSE_BUDGET) -> jax.Array:
    """Return token weights W [P,K,T]: the loss is sum W phi(delta, c), where c [P,K] includes the 1/K of its group.

    n_k is the number of tokens of response k, K_p the number of responses of a prompt and N the number of all tokens;
    P counts the prompts that have a token:

    | aggregation | W | effect for c = -A / K |
    |---|---|---|
    | token-mean | K_p / N | every token of the batch has the same weight (DAPO) |
    | seq-mean-token-mean | 1 / (P n_k) | every response of a group has the same weight (GRPO) |
    | seq-mean-token-sum | 1 / P | the weight of a response is its length |
    | seq-mean-token-sum-norm | 1 / (P max_tokens) | the same, divided by a constant (Dr. GRPO) |

    Args:
      tokens: [P,K,T] bool, the tokens to include.
      aggregation: one of `AGGREGATIONS`, which are verl's names.
      max_tokens: the constant of "seq-mean-token-sum-norm": the response budget of the run. It is never the padded
        width, because then the step size would depend on the longest response of the batch.

    Returns:
      [P,K,T] float32, 0 outside `tokens`, finite if there are no tokens.
    """
    lengths = tokens.sum(-1, keepdims=True)  # [P,K,1]
    responses = (lengths > 0).sum(1, keepdims=True)  # [P,1,1]
    prompts = jnp.maximum((responses > 0).sum(), 1)
    if aggregation == "token-mean":
        each = responses / jnp.maximum(lengths.sum(), 1)
    elif aggregation == "seq-mean-token-mean":
        each = 1 / (prompts * jnp.maximum(lengths, 1))
    elif aggregation == "seq-mean-token-sum":
        each = 1 / prompts
    else:
        each = 1 / (prompts * max_tokens)
    return jnp.where(tokens, each, 0)


@dataclasses.dataclass(frozen=True)
class Aggregate(Part):
    """The aggregation of a method, as a part.

    Attributes:
      aggregation: see `token_weights`.
      max_tokens: the constant of "seq-mean-token-sum-norm". `lpo train` sets it to the run's response budget unless
        the config or the method's paper gives another number.
    """

    aggregation: str = "seq-mean-token-mean"
    max_tokens: int = RESPONSE_BUDGET

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return weights [P,K,T] of the tokens [P,K,T] to include."""
        return token_weights(tokens, self.aggregation, self.max_tokens)


@dataclasses.dataclass(frozen=True)
class TokenWeight(Part):
    """The base class."""

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        """Return weights [P,K,T], finite everywhere.

        Args:
          context: the minibatch.
          u: utilities [P,K], or [P,K,T] if the method assigns credit to tokens.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Untaught(TokenWeight):
    """0 on the responses that learn from a teacher instead, 1 on the others."""

    reads = (Field.TEACHER,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        return (context.tokens & ~required(context.scored.teacher).valid[..., None]).astype(u.dtype)


@dataclasses.dataclass(frozen=True)
class TopEntropy(TokenWeight):
    """1 on the tokens of the highest entropy in the minibatch, 0 on the others.

    Attributes:
      top_tokens: their share of the tokens.

    References:
      Beyond the 80/20 Rule, arXiv 2506.01939, which divides by all tokens, as here; EARL.
    """

    top_tokens: float = 0.2
    reads = (Field.ENTROPY,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        entropy = as_float(required(context.stats.entropy))
        return (entropy >= _cut(entropy, context, 1 - self.top_tokens)).astype(u.dtype) * context.tokens


@dataclasses.dataclass(frozen=True)
class TopImpact(TokenWeight):
    """1 on the tokens of the minibatch with the largest |A| H, 0 on the others; the share changes over the run.

    Attributes:
      tokens_initial: their share of the tokens at the first step.
      tokens_final: their share at the last step; in between it is linear in the step. UNCERTAIN: the paper's shares
        were not found; the defaults are ours.

    References:
      D3S, token level, as third-party notes quote it.
    """

    tokens_initial: float = 0.25
    tokens_final: float = 0.75
    reads = (Field.ENTROPY, Field.PROGRESS)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        rise = self.tokens_final - self.tokens_initial
        share = self.tokens_initial + required(context.scored.progress) * rise
        impact = jnp.abs(_by_token(u)) * as_float(required(context.stats.entropy))
        return (impact >= _cut(impact, context, 1 - share)).astype(u.dtype) * context.tokens


@dataclasses.dataclass(frozen=True)
class CurvatureMask(TokenWeight):
    """0 on the tokens of the largest estimated curvature, 1 on the others.

    The estimate is A^2 |e - pi|^2 |h|^2, the squared gradient of the last layer, from which its Fisher information is
    computed; |e - pi|^2 = 1 - 2 pi(token) + sum pi^2.

    Attributes:
      reject_tokens: share of the minibatch's tokens that is left out.

    References:
      CAPO (curvature), as third-party notes quote it. The paper compares second moments of an Adam step, of the
      objective and of the policy, with absolute thresholds (not found); it reports that under 8% are rejected.
    """

    reject_tokens: float = 0.08
    reads = (Field.COLLISION, Field.HIDDEN_NORM)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        stats = context.stats
        p = jnp.exp(jnp.where(context.tokens, as_float(stats.logp), 0))
        error = 1 - 2 * p + as_float(required(stats.collision))
        bend = jnp.square(_by_token(u) * as_float(required(stats.hidden_norm))) * error
        return (bend <= _cut(bend, context, 1 - self.reject_tokens)).astype(u.dtype) * context.tokens


@dataclasses.dataclass(frozen=True)
class Conflicts(TokenWeight):
    """Weights for prefixes and suffixes shared by responses above and below the mean: kept above, removed below.

    A token is in conflict if, at every position up to it, some response above the group's mean and some response below
    it have the same token as this response; or likewise at every position from it to the end, counted from the ends of
    the responses. Its weight is `conflict_weight` on a response above the mean (squared if both hold) and 0 on one
    below. All weights of a response are divided by the number of its tokens in conflict, at least 1. A response at the
    mean has weight 1 on all tokens.

    Attributes:
      conflict_weight: weight of tokens in conflict on the responses above the mean.

    References:
      GTPO, public code winstonsmith1897/GTPO.
    """

    conflict_weight: float = 2.0
    reads = (Field.TOKEN_IDS,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        tokens, ids = context.tokens, required(context.scored.token_ids)
        above = centred(context.rewards, context.valid)
        # Align the responses at their ends: column k holds the k-th last token.
        T = tokens.shape[-1]
        last_first = context.lengths[..., None] - 1 - jnp.arange(T)
        there = last_first >= 0
        from_end = jnp.where(there, jnp.take_along_axis(ids, jnp.maximum(last_first, 0), -1), 0)
        start = _shared_run(ids, tokens, above)
        end = _shared_run(from_end, there, above)
        end = jnp.take_along_axis(end, jnp.maximum(last_first, 0), -1) & tokens
        weight = jnp.where(above > 0, self.conflict_weight, 0.0)[..., None]
        shared = jnp.where(start, weight, 1) * jnp.where(end, weight, 1)
        count = jnp.maximum((start | end).sum(-1, keepdims=True), 1)
        # A response at the mean has no conflict. Its coefficient need not be 0: see `EntropyCost`.
        return (tokens * jnp.where((above == 0)[..., None], 1, shared / count)).astype(u.dtype)


@dataclasses.dataclass(frozen=True)
class TruncatedImportance(TokenWeight):
    """min(pi_b / pi_sampler, cap) of each token, for a sampler whose arithmetic differs from the trainer's.

    pi_b is the behaviour policy as the trainer computes it; pi_sampler is the same policy as the sampler computed it,
    in lower precision. The ratio corrects the expectation to that of samples from pi_b; the cap bounds its variance.

    Attributes:
      importance_cap: upper bound of the weight.

    References:
      Truncated importance sampling of Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL
      Training, 2025; verl's `rollout_is: token`, whose threshold is 2 as well.
    """

    importance_cap: float = 2.0
    reads = (Field.SAMPLER_LOGP,)

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        scored = context.scored
        gap = as_float(scored.behaviour_logp) - as_float(required(scored.sampler_logp))
        gap = jnp.where(context.tokens, gap, 0)
        return jnp.minimum(jnp.exp(gap), self.importance_cap).astype(u.dtype) * context.tokens


Pair: TypeAlias = tuple[jax.Array, jax.Array]


def _shared_run(ids: jax.Array, tokens: jax.Array, above: jax.Array) -> jax.Array:
    """Return the longest prefix [P,K,T] of each response that both sides of its group share, bool."""

    def look_at(seen: Pair, other: tuple[jax.Array, ...]) -> tuple[Pair, None]:
        ids_j, tokens_j, above_j = other  # of response j: [P,T], [P,T], [P]
        same = (ids == ids_j[:, None]) & tokens & tokens_j[:, None]
        by_above, by_below = seen
        above_side, below_side = (above_j > 0)[:, None, None], (above_j < 0)[:, None, None]
        return (by_above | (same & above_side), by_below | (same & below_side)), None

    # Scan over responses: an array [P,K,K,T] would be the largest of the step.
    others = tuple(jnp.moveaxis(x, 1, 0) for x in (ids, tokens, above))
    none = jnp.zeros(tokens.shape, bool)
    (by_above, by_below), _ = jax.lax.scan(look_at, (none, none), others)
    return jnp.cumprod(by_above & by_below, -1) == 1


def _cut(x: jax.Array, context: Context, quantile: float | jax.Array) -> jax.Array:
    """Return the quantile of `x` over the tokens of the minibatch, a scalar; NaN, which nothing exceeds, for none."""
    return jnp.nanquantile(jnp.where(context.tokens, x, jnp.nan), quantile)


def _by_token(u: jax.Array) -> jax.Array:
    return u if u.ndim == 3 else u[..., None]


NFT_WEIGHTS = ("dr-grpo", "grpo")


@dataclasses.dataclass(frozen=True)
class PromptWeight(Part):
    """The base class: a weight lambda of each prompt.

    `Objective.prompt_weight_inside` decides whether a weight sharpens the target or multiplies the loss.
    """

    def __call__(self, context: Context) -> jax.Array:
        """Return weights [P,1], finite whatever the rewards are."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SignalShare(PromptWeight):
    """N / N', where N' of the N groups have rewards that differ, so that groups without signal do not dilute the step.

    References:
      GPG, arXiv 2504.02546, the factor alpha.
    """

    def __call__(self, context: Context) -> jax.Array:
        count = context.valid.any(-1).sum() / jnp.maximum(_mixed(context).sum(), 1)
        return jnp.broadcast_to(count, context.rewards[:, :1].shape)


@dataclasses.dataclass(frozen=True)
class Difficulty(PromptWeight):
    """N' softmax(-p / t) over the N' groups whose rewards differ, with pass rates p: harder prompts count more.

    A group whose rewards differ although no response passes is treated as one that always passes. Groups of equal
    rewards get weight 1; their advantages are 0.

    Attributes:
      difficulty_temperature: t, in pass rate.

    References:
      MathForge (DGPO's difficulty-aware question weighting), public code AMAP-ML/MathForge.
    """

    difficulty_temperature: float = 2.0

    def __call__(self, context: Context) -> jax.Array:
        mixed = _mixed(context)
        p = jnp.where(context.pass_rate > 0, context.pass_rate, 1)
        # A softmax over nothing is NaN: without a mixed group it is taken over all groups and then masked.
        share = jax.nn.softmax(-p / self.difficulty_temperature, axis=0, where=mixed | ~mixed.any())
        return jnp.where(mixed, mixed.sum() * share, 1)


@dataclasses.dataclass(frozen=True)
class LongerSuccess(PromptWeight):
    """1 if the longest passing response is longer than the mean of the failing ones, `short_weight` otherwise.

    Failing responses that were truncated do not count. If there are no others, one passing response is enough.

    Attributes:
      short_weight: the weight of the other prompts.

    References:
      ADORA, public code ShadeCloak/ADORA (its text variant).
    """

    short_weight: float = 0.1

    def __call__(self, context: Context) -> jax.Array:
        truncated = context.scored.truncated
        failed = context.valid & ~context.passed
        ended = failed if truncated is None else failed & (truncated == 0)
        longest = jnp.where(context.passed, context.lengths, 0).max(-1, keepdims=True)
        mean = masked_mean(context.lengths, ended, -1, keepdims=True)
        return jnp.where(longest > mean, 1.0, self.short_weight)


@dataclasses.dataclass(frozen=True)
class NftWeight(PromptWeight):
    """The weight with which negative-aware fine-tuning is a policy gradient on-policy.

    p is the pass rate of the group, clipped to [0.02, 0.98].

    Attributes:
      nft_weight: "dr-grpo": 1 - p, or "grpo": sqrt((1 - p) / p), named after the method that each equals on-policy.

    References:
      NFT, public code NVlabs/NFT.
    """

    nft_weight: str = "dr-grpo"

    def __call__(self, context: Context) -> jax.Array:
        p = context.pass_rate.clip(0.02, 0.98)
        return 1 - p if self.nft_weight == "dr-grpo" else jnp.sqrt((1 - p) / p)


def _mixed(context: Context) -> jax.Array:
    """Return which groups have rewards that differ, [P,1] bool."""
    return (centred(context.rewards, context.valid) != 0).any(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class HookWeight(PromptWeight):
    """`Scored.weight`, which a hook of the run fills; 1 if it is None."""

    uses = (Field.WEIGHT,)

    def __call__(self, context: Context) -> jax.Array:
        weight = context.scored.weight
        return jnp.ones_like(context.rewards[:, :1]) if weight is None else weight[:, None]
