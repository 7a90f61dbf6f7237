"""The model that a run trains: how it is initialised, run and stored.

Depends on the config and the sizes of the model alone, so that the planner can use it without weights and without data.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lpo_jax.config import Config
from lpo_jax.models import lora
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import Params, abstract_params, init_params
from lpo_jax.models.load import load_weights
from lpo_jax.models.placement import committed, constrain_params, current_shardings, placed
from lpo_jax.models.runner import ModelRunner
from lpo_jax.objectives import Objective
from lpo_jax.objectives.batch import Field, Source, fields_from
from lpo_jax.parallel.mesh import STATE_BYTES
from lpo_jax.runs.state import TrainState
from lpo_jax.training.memory import Microbatch, fit_microbatch
from lpo_jax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The model that a run trains, without its weights, which `load_state` reads."""

    config: Config
    architecture: ModelConfig

    @property
    def dtype(self) -> jnp.dtype:
        """Type of activations and matrix products."""
        return jnp.dtype(self.config.model.dtype)

    @property
    def adapters(self) -> lora.Lora | None:
        """The run's adapters; None if all weights are trained."""
        return lora.configured(self.config.model.lora)

    @property
    def freezes_tower(self) -> bool:
        """Whether the decoder is trained and the vision tower is not."""
        return lora.freezes_tower(self.config.model, self.architecture)

    @property
    def trainable(self) -> Params:
        """Shapes and types of what the optimizer updates: the adapters, or all parameters that are not frozen."""
        if self.adapters is not None:
            return lora.abstract_params(self.architecture, self.adapters)
        return without_tower(abstract_params(self.architecture), self.freezes_tower)

    @property
    def abstract_frozen(self) -> lora.Frozen | None:
        """Shapes and types of what the optimizer does not update; None if that is nothing."""
        whole = abstract_params(self.architecture, self.config.model.frozen_dtype)
        if self.adapters is not None:
            return lora.Frozen(whole, self.adapters.scale)
        return lora.Frozen({"vision": whole["vision"]}, None) if self.freezes_tower else None

    @property
    def num_params(self) -> int:
        """Number of parameters of the model."""
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(self.architecture)))

    def load_params(self, dtype: str = "float32") -> Params:
        """The initial weights: read from the model's files, or drawn from the run's seed in float32."""
        where = current_shardings(self.architecture)
        if self.config.model.init == "random":
            key = jax.random.key(self.config.seed)
            return committed(init_params(self.architecture, key, shardings=where))
        return committed(load_weights(self.config.model.path, dtype, where))

    def load_frozen(self) -> lora.Frozen | None:
        """What the run does not train: the base of its adapters or the vision tower; None if it trains all weights."""
        if self.freezes_tower:
            return lora.Frozen({"vision": self.load_params(self.config.model.frozen_dtype)["vision"]}, None)
        if self.adapters is None:
            return None
        return lora.Frozen(self.load_params(self.config.model.frozen_dtype), self.adapters.scale)

    def load_state(self) -> TrainState:
        """The initial model without an optimizer: float32 weights, or a frozen base with fresh adapters."""
        if self.adapters is None:
            params = without_tower(self.load_params(), self.freezes_tower)
            return TrainState(params, None, frozen=self.load_frozen())
        fresh = committed(lora.init(self.architecture, self.adapters, jax.random.key(self.config.seed)))
        return TrainState(fresh, None, frozen=self.load_frozen())

    @functools.cached_property
    def microbatch(self) -> Microbatch:
        """The size of a microbatch; decided once, so that a run compiles one program."""
        state = STATE_BYTES[self.config.optimizer.state] * sum(
            leaf.size for leaf in jax.tree.leaves(self.trainable)
        )
        state += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract_frozen))
        return fit_microbatch(self.config, self.architecture, state)

    def runner(self, temperature: float, objective: Objective | None = None) -> ModelRunner:
        """Return a runner of the model over groups with the memory settings of the run.

        Args:
          temperature: of the distribution that responses were sampled from.
          objective: decides which extra token statistics are computed; None computes none.
        """
        needs = objective.needs if objective else ()
        return ModelRunner(
            self.architecture,
            temperature,
            self.microbatch.token_budget,
            self.dtype,
            self.microbatch.remat,
            tuple(sorted(fields_from(Source.POLICY_EXTRA).intersection(needs))),
            self.config.model.attention,
        )

    def start(
        self, state: TrainState, optimizer: Optimizer, objective: Objective | None = None
    ) -> TrainState:
        """A state's parameters with a fresh optimizer state, and the arrays that the objective keeps beside them."""
        state = committed(self._fresh(state, optimizer, objective))
        return state.replace(opt_state=optimizer.at_rest(state.opt_state))

    def _fresh(self, state: TrainState, optimizer: Optimizer, objective: Objective | None) -> TrainState:
        """`start`, with everything in the memory of the devices."""
        params = state.params
        control, referred = (
            (objective.init_control(), Field.REF_LOGP in objective.needs) if objective else (None, False)
        )
        # A copy, because the update donates the parameters.
        reference = jax.tree.map(jnp.copy, params) if referred else None
        # Each moment has the sharding of its parameter.
        opt_state = jax.jit(lambda p: constrain_params(self.architecture, optimizer.init(p)))(params)
        return TrainState(params, opt_state, control, reference, state.frozen)

    def abstract_state(self, optimizer: Optimizer, objective: Objective | None = None) -> TrainState:
        """Shapes, types and shardings of a train state, to restore or to plan one."""
        state = TrainState(self.trainable, None, frozen=self.abstract_frozen)
        start = lambda s: self._fresh(s, optimizer, objective)  # noqa: E731
        return placed(self.architecture, jax.eval_shape(start, state))


def without_tower(params: Params, freezes: bool) -> Params:
    """Return the parameters without those of the vision tower, if it is frozen."""
    return {name: x for name, x in params.items() if not (freezes and name == "vision")}
