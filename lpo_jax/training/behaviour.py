"""The choice of the behaviour policy's log-probs: the sampler's, or the trainer's for the same tokens.

The sampler decodes token by token and the trainer runs whole rows, so the two round differently. In float32 the gap is
around 1e-5 nats a token; in bfloat16 around 1e-2, more than the clip range of a ratio of whole sequences (GSPO: 3e-4).
In the first update after sampling the behaviour log-probs are used as the current ones, so that the ratio is 1 in
either case. Wherever log-probs of the trainer are compared with those of the sampler, the gap looks like a change of
the policy.

With `sampling.ahead`, earlier weights have drawn a part of the tokens. The sampler's log-probs are then those of the
behaviour policy, and the first update computes the current ones. The trainer's are those of the policy before the first
update, which is the proximal policy of the decoupled objective (Hilton et al. 2021, arXiv 2110.00641): a method that
weights tokens by the ratio of the two (truncated importance) may use them as its behaviour policy, others may not.
"""

import dataclasses

import jax.numpy as jnp

from lpo_jax.config import Config
from lpo_jax.objectives import Objective
from lpo_jax.objectives.batch import Field


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """The resolved value of `training.behaviour`.

    Attributes:
      choice: "sampled" or "rescored".
      reason: explains the choice in the run's introduction and in run.json.
    """

    choice: str
    reason: str

    @property
    def rescored(self) -> bool:
        """Whether the trainer computes the log-probs of every round before its first update."""
        return self.choice == "rescored"

    def resolve(self, config: Config) -> Config:
        """Return the config with the choice instead of `auto`."""
        training = dataclasses.replace(config.training, behaviour=self.choice)
        return dataclasses.replace(config, training=training)


def rounded_sampling(config: Config) -> str | None:
    """Return the setting by which sampling runs another model than the one that is trained; None if it does not."""
    sampling = config.sampling
    if sampling.weights == "int8":
        return "sampling.weights = int8"
    return None if sampling.kv_dtype == "compute" else f"sampling.kv_dtype = {sampling.kv_dtype}"


def choose_behaviour(config: Config, objective: Objective) -> Behaviour:
    """Resolve `training.behaviour`: with `auto`, log-probs are rescored if the gap can matter."""
    asked, dtype = config.training.behaviour, config.model.dtype
    updates = config.training.updates_per_step + objective.extra_updates
    if asked != "auto":
        return Behaviour(asked, "as set")
    if Field.SAMPLER_LOGP in objective.needs:
        return Behaviour("rescored", f"{objective.name} compares the trainer's log-probs with the sampler's")
    if rounded := rounded_sampling(config):
        return Behaviour("rescored", f"{rounded} samples from another model than is trained")
    if config.sampling.ahead:
        return Behaviour(
            "sampled", "sampling.ahead: the trainer no longer has the behaviour policy of every token"
        )
    if jnp.dtype(dtype).itemsize >= 4:
        return Behaviour("sampled", f"in {dtype} the sampler and the trainer agree")
    if updates > 1:
        return Behaviour("rescored", f"{dtype}, and later updates of a step compare with these")
    if Field.REF_LOGP in objective.needs:
        return Behaviour("rescored", f"{dtype}, and the reference's log-probs are compared with these")
    return Behaviour("sampled", "one update a step, in which they stand for the current ones")
