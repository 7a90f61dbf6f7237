"""Flow balance (FlowRL): the policy matches exp(reward) up to a learnt constant of the prompt.

The squared residual is that of the logit variance, with log Z(x) in place of the group's mean.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, ControlState, Field, Listwise, required
from lpo_jax.objectives.part import Control
from lpo_jax.objectives.probe import folded
from lpo_jax.objectives.projection import ScoreLoss, reference_scores
from lpo_jax.objectives.shaping import Bias
from lpo_jax.objectives.simplex import masked_mean
from lpo_jax.objectives.trust import ratio

# Features of a prompt after folding, so that the shape of the state does not depend on the width of the model.
WIDTH = 256

# Upper bound of the probability ratio that weights a response.
RATIO_MAX = 10.0


@dataclasses.dataclass(frozen=True)
class Scaled(Bias):
    """beta u.

    Attributes:
      reward_scale: beta.
    """

    reward_scale: float = 15.0

    def __call__(self, context: Context, u: jax.Array) -> jax.Array:
        return self.reward_scale * u


@dataclasses.dataclass(frozen=True)
class FlowBalance(ScoreLoss):
    """The mean over the group of w (log Z + s - u)^2 / 2, s the mean log-ratio to the reference.

    w = min(rho, 10), where rho is the probability ratio of the whole response to the behaviour policy; w is a constant
    of the update. `LogPartition` learns log Z from the same loss.

    References:
      FlowRL, arXiv 2509.15207; public code Xuekai-Zhu/FlowRL.
    """

    reads = (Field.REF_LOGP, Field.FEATURES, Field.CONTROL)

    def scores(self, logp: jax.Array, delta: jax.Array, context: Context) -> jax.Array:
        return reference_scores(logp, context)

    def log_target(self, u: jax.Array, s_t: jax.Array | None, valid: jax.Array) -> jax.Array:
        return super().log_target(u, None, valid)

    def value(self, context: Context, u: jax.Array, s: jax.Array, log_w: jax.Array) -> jax.Array:
        residual = log_partition(required(context.scored.control), context) + s - u
        return masked_mean(response_weights(context) * jnp.square(residual) / 2, context.valid, -1)

    def clipped(self, context: Context) -> jax.Array:
        return ratio(context.delta.sum(-1)) > RATIO_MAX


@dataclasses.dataclass(frozen=True)
class LogPartition(Control):
    """log Z(x), a linear function of a sketch of the prompt's features, with one normalised gradient step per update.

    Attributes:
      log_z_rate: the share of a prompt's weighted mean residual that one step on this prompt alone removes.
    """

    log_z_rate: float = 0.1

    def init(self) -> ControlState:
        return {"weights": jnp.zeros(WIDTH), "bias": jnp.zeros(())}

    def update(self, state: ControlState, context: Context, view: Listwise) -> ControlState:
        residual = log_partition(state, context) + view.scores - view.utilities
        w = jnp.where(context.valid, response_weights(context), 0)
        # A full step removes the weighted mean, so a smaller step cannot overshoot, whatever the weights are.
        mean = (w * residual).sum(-1) / jnp.maximum(w.sum(-1), 1e-30)  # [P]
        step = self.log_z_rate * jnp.where(view.active, mean, 0) / jnp.maximum(view.active.sum(), 1)
        # The sketch and the constant input of the bias both have length 1: half a step in each makes a full step.
        return {
            "weights": state["weights"] - step / 2 @ _sketch(context),
            "bias": state["bias"] - step.sum() / 2,
        }


def response_weights(context: Context) -> jax.Array:
    """Return w [P,K], the bounded probability ratio of each response."""
    return jnp.minimum(ratio(context.delta.sum(-1)), RATIO_MAX)


def log_partition(state: dict[str, jax.Array], context: Context) -> jax.Array:
    """Return log Z [P,1] of each prompt."""
    return (_sketch(context) @ state["weights"] + state["bias"])[:, None]


def _sketch(context: Context) -> jax.Array:
    """Return the mean features of each group [P,WIDTH], scaled to length 1, or 0."""
    x = folded(context, WIDTH).sum(1) / context.size
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
