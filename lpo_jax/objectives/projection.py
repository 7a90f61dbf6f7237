"""Projections: from utilities and scores to the coefficient of each response.

listwise          P = softmax(s) moves to the target w*, by a divergence on the simplex
policy gradient   c = -u / K, which every divergence approximates near a uniform P
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, Field, required
from lpo_jax.objectives.divergences import ALPHA, Divergence, alpha_divergence, divergence
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.simplex import as_float, listwise_log_probs, sequence_scores
from lpo_jax.objectives.targets import ENTMAX_ALPHA, TARGETS, entmax_log_probs
from lpo_jax.objectives.weights import token_weights


@dataclasses.dataclass(frozen=True)
class Projection(Part):
    """The policy gradient, c = -u / K. It is the base class of the other projections.

    Attributes:
      absolute: whether scores are log-probs instead of log-ratios, and so not 0 on-policy.
    """

    absolute: ClassVar[bool] = False

    def scores(self, logp: jax.Array, delta: jax.Array, context: Context) -> jax.Array:
        """Return s [P,K], in nats, from log-probs [P,K,T] and the log-ratios `delta` [P,K,T] after the gate."""
        return sequence_scores(delta, context.tokens)

    def log_target(self, u: jax.Array, s_t: jax.Array | None, valid: jax.Array) -> jax.Array:
        """Return log w* [P,K] from utilities u [P,K] and s_t [P,K], the scores at the start of the update (None: 0)."""
        return TARGETS["softmax"](u, s_t, valid)

    def token_weights(self, tokens: jax.Array) -> jax.Array:
        """Return d s_k / d delta [P,K,T], divided by the number of prompts: the weights of a loss on scores."""
        return token_weights(tokens, "seq-mean-token-mean")

    def value(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array | None:
        """Return the loss [P] whose gradient is `coefficients`; None if the loss is the gate's surrogate."""
        return None

    def coefficients(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        """Return c = d loss / d s [P,K], or [P,K,T] for utilities [P,K,T]."""
        size = context.size if u.ndim == 2 else context.size[..., None]
        return -u / size

    def clipped(self, context: Context) -> jax.Array:
        """Return the responses [P,K] whose importance weight in the coefficients is clipped: here none."""
        return jnp.zeros_like(context.valid)


@dataclasses.dataclass(frozen=True)
class Simplex(Projection):
    """P = softmax(s) moves to w* = target(u + s_t).

    Attributes:
      score: "mean" or "sum" of a response's token log-ratios, see `sequence_scores`.
      target: "softmax" (the paper's), or "entmax", "sparsemax" or "one-hot", under which w* can be exactly 0.
      target_alpha: alpha of the target "entmax"; near 1 it is "softmax", at 2 "sparsemax".
      divergence: a name in `DIVERGENCES`, or a `Divergence`.
      alpha: alpha of the divergence "alpha"; at 0 it is reverse KL, at 1 forward KL.

    Raises:
      ValueError: an option has no effect, or the divergence is infinite for the target.
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
        """The divergence as an object."""
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
    """`Simplex` with scores that are log-probs instead of log-ratios to the behaviour policy (TPO).

    The sampling probability then counts twice: as the frequency of the samples, and in P.

    References:
      TPO, arXiv 2604.06159; public code JeanKaddour/tpo.
    """

    absolute: ClassVar[bool] = True

    def scores(self, logp: jax.Array, delta: jax.Array, context: Context) -> jax.Array:
        return sequence_scores(jnp.where(context.tokens, as_float(logp), 0), context.tokens, self.score)


def reference_scores(logp: jax.Array, context: Context, score: str = "mean") -> jax.Array:
    """Return scores [P,K] from log-ratios to the reference policy instead of the behaviour policy."""
    return sequence_scores(as_float(logp) - as_float(required(context.stats.ref_logp)), context.tokens, score)


@dataclasses.dataclass(frozen=True)
class ReferenceSimplex(Simplex):
    """`Simplex` with log-ratios to the reference as scores, so that the target is pi_ref exp(R / tau) (CoPG).

    This optimum is the same in every update, whatever the behaviour policy is.
    """

    reads = (Field.REF_LOGP,)

    def scores(self, logp: jax.Array, delta: jax.Array, context: Context) -> jax.Array:
        return reference_scores(logp, context, self.score)

    def log_target(self, u: jax.Array, s_t: jax.Array | None, valid: jax.Array) -> jax.Array:
        return super().log_target(u, None, valid)


@dataclasses.dataclass(frozen=True)
class ScoreLoss(Projection):
    """The base class of losses on the scores of a group that are not a divergence between P and a target.

    Subclasses define `value`; the coefficients are its derivative.
    """

    def value(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        raise NotImplementedError

    def coefficients(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        c: jax.Array = jax.grad(lambda s: self.value(context, u, s, log_w).sum())(s)
        return c
