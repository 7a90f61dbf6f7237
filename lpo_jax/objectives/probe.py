"""POISE: the baseline of a response is predicted by a linear probe from the hidden states of the *other* responses.

The states of response j are independent of how response k was drawn, so such a baseline leaves the policy gradient
unbiased, and two responses per prompt are enough.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.advantage import CENTRES, Utility
from lpo_jax.objectives.batch import Context, ControlState, Field, Listwise, required
from lpo_jax.objectives.part import Control
from lpo_jax.objectives.simplex import as_float, masked_mean


@dataclasses.dataclass(frozen=True)
class Probe(Control):
    """A ridge regression from a response's features to the mean reward of the others, refitted at every update.

    It is fitted on the most recent responses, with features standardised to mean 0 and variance 1.

    Attributes:
      probe_buffer: number of responses that it is fitted on.
      probe_width: number of features. Additional features are folded into this number: they are added with random
        signs, so that the shape of the state does not depend on the model. UNCERTAIN: the paper does not fold.
      probe_ridge: penalty on the squared coefficients. UNCERTAIN: the paper's value was not found; the default is ours.

    References:
      POISE, arXiv 2605.07579.
    """

    probe_buffer: int = 2048
    probe_width: int = 256
    probe_ridge: float = 1.0

    def init(self) -> ControlState:
        N, F = self.probe_buffer, self.probe_width
        rows = {"features": jnp.zeros((N, F)), "targets": jnp.zeros(N), "filled": jnp.zeros(N, bool)}
        return rows | {"mean": jnp.zeros(F), "slope": jnp.zeros(F), "level": jnp.zeros(())}

    def update(self, state: ControlState, context: Context, view: Listwise) -> ControlState:
        new = {
            "features": folded(context, self.probe_width).reshape(-1, self.probe_width),
            "targets": _of_others(context.rewards, context.valid).ravel(),
            "filled": (context.valid & (context.size > 1)).ravel(),
        }
        rows = {
            name: jnp.concatenate([state[name], x.astype(state[name].dtype)])[-self.probe_buffer :]
            for name, x in new.items()
        }
        return rows | self._fit(**rows)

    def _fit(self, features: jax.Array, targets: jax.Array, filled: jax.Array) -> dict[str, jax.Array]:
        mean, level = masked_mean(features, filled[:, None], 0), masked_mean(targets, filled)
        x = jnp.where(filled[:, None], features - mean, 0)
        n = jnp.maximum(filled.sum(), 1)
        scale = jnp.sqrt(jnp.square(x).sum(0) / n)
        x = x / jnp.where(scale > 0, scale, 1)
        with jax.default_matmul_precision("highest"):
            gram = x.T @ x / n + self.probe_ridge * jnp.eye(self.probe_width)
            moment = x.T @ jnp.where(filled, targets - level, 0) / n
            slope = jax.scipy.linalg.solve(gram, moment, assume_a="pos")
        return {"mean": mean, "slope": slope / jnp.where(scale > 0, scale, 1), "level": level}


@dataclasses.dataclass(frozen=True)
class ProbeAdvantage(Utility):
    """A_k = (R_k - mean over the others j of g(features of j)) / tau, where g is the probe; RLOO until it is fitted.

    References:
      POISE, arXiv 2605.07579, the cross-rollout baseline (for two responses: A_1 = R_1 - g(phi_2)).
    """

    temperature: str | float = "dr-grpo"
    reads = (Field.FEATURES, Field.CONTROL)

    def difference(self, context: Context) -> jax.Array:
        state = required(context.scored.control)
        deviation = folded(context, state["mean"].size) - state["mean"]
        guess = state["level"] + (deviation * state["slope"]).sum(-1)
        difference = context.rewards - _of_others(guess, context.valid)
        compared = context.valid & (context.size > 1)
        return jnp.where(state["filled"].any(), jnp.where(compared, difference, 0), CENTRES["loo"](context))


def folded(context: Context, width: int) -> jax.Array:
    """Return the features [P,K,width] of the responses, 0 where invalid or not finite.

    Fewer than `width` features are padded with zeros. Of more, feature i is added to index i modulo `width`: the first
    `width` features unchanged, the others with a random sign.
    """
    features = as_float(required(context.scored.features))
    F = features.shape[-1]
    features = jnp.where(context.valid[..., None] & jnp.isfinite(features), features, 0)
    signs = jax.random.rademacher(jax.random.key(0), (F,), features.dtype)
    features = features * jnp.where(jnp.arange(F) < width, 1, signs)
    padded = jnp.pad(features, ((0, 0), (0, 0), (0, -F % width)))
    return padded.reshape(*context.valid.shape, -1, width).sum(-2)


def _of_others(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Return the mean [P,K] of `x` [P,K] over the other valid responses of the group; 0 if there are none."""
    other = valid[..., None, :] & ~jnp.eye(valid.shape[-1], dtype=bool)
    return masked_mean(jnp.broadcast_to(x[..., None, :], other.shape), other, -1)
