"""One temperature for the whole minibatch, set by a KL budget on its targets (MPO)."""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.advantage import AdvantageRule, scaled
from lpo_jax.objectives.batch import Context
from lpo_jax.objectives.simplex import centred, masked_mean
from lpo_jax.objectives.targets import TEMPERATURE_FLOOR, target_log_probs

# Halvings of a range of temperatures as wide as float32 allows.
_HALVINGS = 60


@dataclasses.dataclass(frozen=True)
class DualUtility(AdvantageRule):
    """u = (R - mu) / eta, with the eta >= 1e-6 at which the mean of KL(softmax(R / eta) || uniform) is the budget.

    This eta minimises eta epsilon + eta mean log mean_k exp(R_k / eta), the convex dual of maximising the reward
    within a KL of epsilon of the behaviour policy. Groups of equal rewards are left out of the mean, because their
    target is uniform at every eta. If even the targets that keep only the best responses stay within the budget,
    eta is 1e-6.

    Attributes:
      kl_budget: epsilon, in nats.

    References:
      MPO, arXiv 1806.06920, equation 8 (its E-step); REPS (Peters, Mülling and Altun, 2010).
    """

    kl_budget: float = 0.1

    def __call__(self, context: Context) -> tuple[jax.Array, jax.Array]:
        difference = centred(context.rewards, context.valid)
        mixed = (difference != 0).any(-1)

        def divergence(log_eta: jax.Array) -> jax.Array:
            log_w = target_log_probs(difference, jnp.exp(log_eta), mask=context.valid)
            terms = jnp.exp(log_w) * jnp.where(context.valid, log_w + jnp.log(context.size), 0)
            return masked_mean(terms.sum(-1), mixed)

        def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = interval
            middle = (low + high) / 2
            far = divergence(middle) > self.kl_budget
            return jnp.where(far, middle, low), jnp.where(far, high, middle)

        # The KL of a target is at most (range / eta)^2 / 8 (Hoeffding), and the range twice the largest |R - mu|.
        enough = 2 * jnp.abs(difference).max(initial=0) / (8 * self.kl_budget) ** 0.5
        floor = jnp.log(jnp.asarray(TEMPERATURE_FLOOR, difference.dtype))
        ends = floor, jnp.maximum(jnp.log(jnp.maximum(enough, TEMPERATURE_FLOOR)), floor)
        _, log_eta = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
        eta = jnp.full_like(difference[:, :1], jnp.exp(log_eta))
        return scaled(difference, eta), eta
