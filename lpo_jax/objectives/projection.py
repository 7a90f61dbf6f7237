"""Projections: from utilities and scores to the coefficient of each response.

listwise          P = softmax(s) moves to the target w*, by a divergence on the simplex
policy gradient   c = -u / K, the straight line that every divergence starts as
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lpo_jax.objectives.aggregate import token_weights
from lpo_jax.objectives.batch import Context, required
from lpo_jax.objectives.divergences import ALPHA, Divergence, alpha_divergence, divergence
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, listwise_log_probs, sequence_scores
from lpo_jax.objectives.sparse import ENTMAX_ALPHA, TARGETS, entmax_log_probs


@dataclasses.dataclass(frozen=True)
class Projection(Part):
    """The policy gradient: c = -u / K. The base of the others.

    Attributes:
      absolute: whether scores are of log-probs themselves, and so not 0 on-policy.
    """

    absolute: ClassVar[bool] = False

    def scores(self, logp: jax.Array, delta: jax.Array, context: Context) -> jax.Array:
        """s [P,K] in nats, of log-probs [P,K,T] and the log-ratios `delta` [P,K,T] that the gate lets count."""
        return sequence_scores(delta, context.tokens)

    def log_target(self, u: jax.Array, s_t: jax.Array | None, valid: jax.Array) -> jax.Array:
        """log w* [P,K] of utilities [P,K] and the scores at the start of the update."""
        return TARGETS["softmax"](u, s_t, valid)

    def token_weights(self, tokens: jax.Array) -> jax.Array:
        """d s_k / d delta [P,K,T], the mean over prompts included: what aggregates a loss on scores."""
        return token_weights(tokens, "seq-mean-token-mean")

    def value(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array | None:
        """The loss [P] that `coefficients` is the gradient of; None when it is the gate's surrogate."""
        return None

    def coefficients(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        """c [P,K] = d loss / d s, or [P,K,T] for utilities [P,K,T]."""
        size = context.size if u.ndim == 2 else context.size[..., None]
        return -u / size

    def clipped(self, context: Context) -> jax.Array:
        """The responses [P,K] whose importance weight in the coefficients is clipped: none."""
        return jnp.zeros_like(context.valid)


@dataclasses.dataclass(frozen=True)
class Simplex(Projection):
    """P = softmax(s) moves to w* = target(u + s_t).

    Attributes:
      score: "mean" or "sum" of a response's token log-ratios: see `sequence_scores`.
      target: "softmax" (the paper's); "entmax", "sparsemax" or "one-hot" give some responses exactly nothing.
      target_alpha: of target "entmax": near 1 it is "softmax", at 2 "sparsemax".
      divergence: a word of `DIVERGENCES`, or a `Divergence` of one's own.
      alpha: of divergence "alpha": at 0 it is reverse KL, at 1 forward KL.

    Raises:
      ValueError: an option that would change nothing, or a divergence that is infinite for the target.
    """

    score: str = "mean"
    target: str = "softmax"
    target_alpha: float = ENTMAX_ALPHA
    divergence: str | Divergence = "forward-kl"
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        if self.alpha != ALPHA and self.divergence != "alpha":
            raise ValueError(f"alpha is for divergence='alpha' alone, got divergence={self.measure.name!r}")
        if self.target_alpha != ENTMAX_ALPHA and self.target != "entmax":
            raise ValueError(f"target_alpha is for target='entmax' alone, got target={self.target!r}")
        if self.measure.full_support and self.target != "softmax":
            raise ValueError(
                f"divergence {self.measure.name!r} is infinite where the target is 0, as target={self.target!r} is;"
                " take target='softmax', or a divergence such as 'forward-kl', 'js' or 'brier'"
            )

    @property
    def measure(self) -> Divergence:
        """The divergence itself."""
        return alpha_divergence(self.alpha) if self.divergence == "alpha" else divergence(self.divergence)

    def scores(self, logp: jax.Array, delta: jax.Array, context: Context) -> jax.Array:
        return sequence_scores(delta, context.tokens, self.score)

    def token_weights(self, tokens: jax.Array) -> jax.Array:
        return token_weights(tokens, f"seq-mean-token-{self.score}")

    def log_target(self, u: jax.Array, s_t: jax.Array | None, valid: jax.Array) -> jax.Array:
        if self.target == "entmax":
            return entmax_log_probs(u, s_t, valid, self.target_alpha)
        return TARGETS[self.target](u, s_t, valid)

    def value(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        return self.measure.value(listwise_log_probs(s, context.valid), log_w)

    def coefficients(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        return self.measure.coefficients(listwise_log_probs(s, context.valid), log_w)


@dataclasses.dataclass(frozen=True)
class RawSimplex(Simplex):
    """Scores are the log-probs themselves, not ratios to the policy that sampled (TPO).

    The weights then hold the sampling probability twice: once as the samples' frequency, once in P.

    References:
      TPO, arXiv 2604.06159; public code JeanKaddour/tpo.
    """

    absolute: ClassVar[bool] = True

    def scores(self, logp: jax.Array, delta: jax.Array, context: Context) -> jax.Array:
        return sequence_scores(jnp.where(context.tokens, as_float(logp), 0), context.tokens, self.score)


def reference_scores(logp: jax.Array, context: Context, score: str = "mean") -> jax.Array:
    """Scores [P,K] of log-ratios to the reference instead of the policy that sampled."""
    return sequence_scores(as_float(logp) - as_float(required(context.stats.ref_logp)), context.tokens, score)


@dataclasses.dataclass(frozen=True)
class ReferenceSimplex(Simplex):
    """Scores are log-ratios to the reference, and the target is the reference tilted by the rewards (CoPG).

    So every update has the same optimum, pi_ref exp(R / tau), whichever policy sampled.
    """

    reads = (Field.REF_LOGP,)

    def scores(self, logp: jax.Array, delta: jax.Array, context: Context) -> jax.Array:
        return reference_scores(logp, context, self.score)

    def log_target(self, u: jax.Array, s_t: jax.Array | None, valid: jax.Array) -> jax.Array:
        return super().log_target(u, None, valid)


@dataclasses.dataclass(frozen=True)
class ScoreLoss(Projection):
    """A loss on the scores of a group that is no divergence between P and a target.

    Subclasses give `value`; the coefficients are its derivative.
    """

    def value(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        raise NotImplementedError

    def coefficients(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        c: jax.Array = jax.grad(lambda s: self.value(context, u, s, log_w).sum())(s)
        return c
