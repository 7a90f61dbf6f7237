"""Methods that use only the order of the rewards: labels, preferences, rankings.

They are losses on the scores of a group, or advantages computed from pairs of responses. They have no target;
`Listwise.log_target` is log softmax(R) for them.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lpo_jax.objectives.advantage import AdvantageRule
from lpo_jax.objectives.batch import Context, Field, TokenStats
from lpo_jax.objectives.projection import ScoreLoss, reference_scores
from lpo_jax.objectives.regular import KL
from lpo_jax.objectives.shaping import Bias
from lpo_jax.objectives.simplex import as_float, centred, masked_mean, sequence_scores

LABEL_LOSSES = ("listwise", "bce")


@dataclasses.dataclass(frozen=True)
class Difference(AdvantageRule):
    """u = R - mu and tau = 1, for a method without a temperature."""

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        return centred(context.rewards, context.valid), jnp.ones_like(context.rewards[:, :1])


@dataclasses.dataclass(frozen=True)
class RewardLabels(ScoreLoss):
    """Classification by whether R > mu: log(1 + sum_+ exp(-s / tau)) + log(1 + sum_- exp(s / tau)).

    The 1 is an anchor logit: a response on the right side of s = 0 has a small gradient. |c| <= 1 / tau. On-policy,
    c = -1 / (tau (1 + n)) for each of n responses above the mean and 1 / (tau (1 + n)) for each of n below. A group of
    equal rewards has no labels; its loss is 0.

    Attributes:
      label_loss: "listwise" as above, or "bce": the mean of log(1 + exp(-+ s / tau)) over the responses.
      label_temperature: tau, in nats of score.

    References:
      REAL, arXiv 2602.05630; public code modelscope/ms-swift, `loss_type="real"`.
    """

    label_loss: str = "listwise"
    label_temperature: float = 0.5

    def value(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        above = context.valid & (u > 0)
        below = context.valid & ~above & above.any(-1, keepdims=True)
        x = s / self.label_temperature
        if self.label_loss == "bce":
            return masked_mean(jax.nn.softplus(jnp.where(above, -x, x)), above | below, -1)
        return _anchored(-x, above) + _anchored(x, below)


def _anchored(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return log(1 + sum exp x) [P] over `mask` [P,K]."""
    return jax.nn.logsumexp(jnp.pad(jnp.where(mask, x, -jnp.inf), ((0, 0), (0, 1))), axis=-1)


@dataclasses.dataclass(frozen=True)
class Preferences(ScoreLoss):
    """The mean of -log sigmoid(beta (s_i - s_j)) over pairs of a better response i and a worse response j.

    A passing response is better than a failing one, and a wrong answer is better than a malformed one. Scores are
    log-ratios to the reference. A group with only one level has no pairs: its loss is the mean of -log sigmoid(+-s),
    which raises s if it passed and lowers s otherwise.

    Attributes:
      preference_beta: beta, in 1/nats.
      anisotropy: factor of beta in a pair whose better response passed.

    References:
      TRPA, arXiv 2504.04524; public code XueruiSu/Trust-Region-Preference-Approximation.
    """

    preference_beta: float = 0.1
    anisotropy: float = 2.5
    reads = (Field.REF_LOGP,)

    def scores(self, logp: jax.Array, delta: jax.Array, context: Context) -> jax.Array:
        return reference_scores(logp, context)

    def value(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        malformed = False if context.scored.malformed is None else jnp.asarray(context.scored.malformed) != 0
        level = jnp.where(context.passed, 2, jnp.where(malformed, 0, 1))
        better = (level[:, :, None] > level[:, None, :]) & _pairs(context.valid)
        beta = self.preference_beta * jnp.where(context.passed, self.anisotropy, 1)[:, :, None]
        by_pair = masked_mean(jax.nn.softplus(-beta * (s[:, :, None] - s[:, None, :])), better, (1, 2))
        alone = masked_mean(jax.nn.softplus(jnp.where(context.passed, -s, s)), context.valid, -1)
        return jnp.where(better.any((1, 2)), by_pair, alone)


def _pairs(valid: jax.Array) -> jax.Array:
    """Return which pairs of responses are both valid, [P,K,K] bool."""
    return valid[:, :, None] & valid[:, None, :]


@dataclasses.dataclass(frozen=True)
class SamplerKL(KL):
    """`KL` to the behaviour policy instead of the reference: a trust region."""

    kl_coef: float = 0.001
    reads: ClassVar[tuple[Field, ...]] = ()

    def __call__(self, stats: TokenStats, context: Context) -> jax.Array:
        return super().__call__(stats.replace(ref_logp=context.scored.behaviour_logp), context)


@dataclasses.dataclass(frozen=True)
class RankingAdvantage(Bias):
    """Replace u by how strongly the confidence of each response is in the wrong order with the other verdict.

    v_k is the mean log-prob of response k under the behaviour policy. A passing response gets
    sum_j sigmoid(-(v_k - v_j) / tau) / tau over the failing responses j, and each of these gets minus its term. This is
    minus the gradient with respect to v of sum_ij log(1 + exp(-(v_i - v_j) / tau)), a logistic surrogate of the AUC of
    confidence against correctness. The sum over a group is 0.

    Attributes:
      ranking_temperature: tau, in nats per token.

    References:
      CAPO (calibration), arXiv 2604.12632, as third-party notes quote it.
    """

    ranking_temperature: float = 0.6

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        v = sequence_scores(as_float(context.scored.behaviour_logp), context.tokens)
        pull = jax.nn.sigmoid(-(v[:, :, None] - v[:, None, :]) / self.ranking_temperature)
        opposed = context.passed[:, :, None] & ~context.passed[:, None, :] & _pairs(context.valid)
        pull = jnp.where(opposed, pull / self.ranking_temperature, 0)  # [P,K,K] passed x failed
        return pull.sum(2) - pull.sum(1)
