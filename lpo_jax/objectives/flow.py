"""Flow balance: the policy matches exp(reward) up to a constant of the prompt, which is learnt beside it.

The squared residual is that of the logit variance, with log Z(x) in the place of the group's mean.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.batch import Context, ControlState, Listwise, required
from lpo_jax.objectives.bias import Bias
from lpo_jax.objectives.control import Control
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.probe import folded
from lpo_jax.objectives.projection import ScoreLoss, reference_scores
from lpo_jax.objectives.simplex import masked_mean
from lpo_jax.objectives.trust import ratio

# Numbers that a prompt's features are folded into: a state has one shape whatever the width of the model.
WIDTH = 256

# Largest probability ratio that a response is weighed by.
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

    w = min(rho, 10), rho the probability ratio of the whole response to the policy that sampled; no gradient
    flows through it. `LogPartition` learns log Z by the same loss.

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
    """log Z(x), linear in a sketch of the prompt's features: one normalised gradient step an update.

    Attributes:
      log_z_rate: the share of a prompt's weighted mean residual that a step on it alone takes away.
    """

    log_z_rate: float = 0.1

    def init(self) -> ControlState:
        return {"weights": jnp.zeros(WIDTH), "bias": jnp.zeros(())}

    def update(self, state: ControlState, context: Context, view: Listwise) -> ControlState:
        residual = log_partition(state, context) + view.scores - view.utilities
        w = jnp.where(context.valid, response_weights(context), 0)
        # The weighted mean is a whole step, so that a smaller one cannot overshoot, whatever the weights.
        mean = (w * residual).sum(-1) / jnp.maximum(w.sum(-1), 1e-30)  # [P]
        step = self.log_z_rate * jnp.where(view.active, mean, 0) / jnp.maximum(view.active.sum(), 1)
        # A sketch has length 1 and so has the bias's constant input: half a step in each is a whole one.
        return {
            "weights": state["weights"] - step / 2 @ _sketch(context),
            "bias": state["bias"] - step.sum() / 2,
        }


def response_weights(context: Context) -> jax.Array:
    """w [P,K]."""
    return jnp.minimum(ratio(context.delta.sum(-1)), RATIO_MAX)


def log_partition(state: dict[str, jax.Array], context: Context) -> jax.Array:
    """log Z [P,1] of each prompt."""
    return (_sketch(context) @ state["weights"] + state["bias"])[:, None]


def _sketch(context: Context) -> jax.Array:
    """[P,WIDTH] of length 1, or 0: the mean of a group's features, in which those of the prompt are themselves."""
    x = folded(context, WIDTH).sum(1) / context.size
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
