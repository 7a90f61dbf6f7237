"""Whose log-probs are those of the behaviour policy: the sampler's own, or the trainer's for the same tokens.

The sampler decodes token by token and the trainer runs whole rows, so the two round differently. In float32 the gap is
around 1e-5 nats a token; in bfloat16 around 1e-2, more than the clip range of a ratio of whole sequences (GSPO: 3e-4).
In the first update after sampling the behaviour log-probs stand in for the current ones, so that their ratio is 1
whoever computed them. Wherever log-probs of the trainer are compared with those of the sampler, the gap is taken for a
change of the policy.
"""

import dataclasses

import jax.numpy as jnp

from lpo_jax.config import Config
from lpo_jax.objectives import Objective
from lpo_jax.objectives.fields import Field


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """What `training.behaviour` comes to.

    Attributes:
      choice: "sampled" or "rescored".
      reason: why, for the run's introduction and its record.
    """

    choice: str
    reason: str

    @property
    def rescored(self) -> bool:
        """Whether the trainer scores every round once more before its first update."""
        return self.choice == "rescored"

    def resolve(self, config: Config) -> Config:
        """The config with the choice in the place of `auto`."""
        training = dataclasses.replace(config.training, behaviour=self.choice)
        return dataclasses.replace(config, training=training)


def choose_behaviour(config: Config, objective: Objective) -> Behaviour:
    """Settles `training.behaviour`: under `auto`, rescored where the gap can matter."""
    asked, dtype = config.training.behaviour, config.model.dtype
    updates = config.training.updates_per_step + objective.extra_updates
    if asked != "auto":
        return Behaviour(asked, "as set")
    if Field.SAMPLER_LOGP in objective.needs:
        return Behaviour("rescored", f"{objective.name} compares the trainer's log-probs with the sampler's")
    if config.sampling.weights == "int8":
        return Behaviour("rescored", "sampling.weights = int8 samples from another model than is trained")
    if jnp.dtype(dtype).itemsize >= 4:
        return Behaviour("sampled", f"in {dtype} the sampler and the trainer agree")
    if updates > 1:
        return Behaviour("rescored", f"{dtype}, and later updates of a step compare with these")
    if Field.REF_LOGP in objective.needs:
        return Behaviour("rescored", f"{dtype}, and the reference's log-probs are compared with these")
    return Behaviour("sampled", "one update a step, in which they stand for the current ones")
