"""AdamW with a schedule, by optax. Gradients are clipped; non-finite gradients are skipped and counted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lpo_jax.config import Config, OptimizerConfig
from lpo_jax.models.decoder import Params
from lpo_jax.models.parameters import of_path
from lpo_jax.objectives import Objective
from lpo_jax.training.moments import in_bfloat16, moments_to_device, moments_to_host


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Return the learning rate by update: linear warm-up, then constant or decaying to `final_fraction`."""
    peak, warmup = config.learning_rate, config.warmup_updates
    rest = max(total_updates - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * config.final_fraction, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_fraction),
    }[config.schedule]()
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup), after], [warmup])


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation whose gradients are clipped by their norm and skipped if they are not finite.

    It is equivalent to `optax.clip_by_global_norm` and `optax.apply_if_finite`, and has the latter's state. The norm is
    computed once for both, and updates are applied as they are computed, so that a tree of updates, 4 bytes for each
    parameter, is never in memory.

    Attributes:
      rule: the transformation from gradients to updates.
      clip_norm: the largest norm of a gradient; 0 disables clipping.
      schedule: the learning rate by update.
      on_host: whether the moments are in the memory of the host between the updates of two steps.
    """

    rule: optax.GradientTransformation
    clip_norm: float = 0.0
    schedule: optax.Schedule | None = None
    on_host: bool = False

    def init(self, params: Params) -> optax.ApplyIfFiniteState:
        count = lambda: jnp.zeros([], jnp.int32)  # noqa: E731 - an array each: both are donated
        return optax.ApplyIfFiniteState(count(), jnp.array(True), count(), self.rule.init(params))

    def apply(
        self, gradient: Params, state: optax.ApplyIfFiniteState, params: Params
    ) -> tuple[Params, optax.ApplyIfFiniteState, jax.Array]:
        """Return the new parameters and state, and the gradient's norm.

        If the norm is not finite, parameters are unchanged and the state counts one more skipped update.
        """
        norm = optax.global_norm(gradient)
        finite = jnp.isfinite(norm)

        def learn(gradient):
            if self.clip_norm:
                scale = jnp.minimum(1.0, self.clip_norm / norm)
                gradient = jax.tree.map(lambda g: g * scale, gradient)
            updates, moved = self.rule.update(gradient, state.inner_state, params)
            return optax.apply_updates(params, updates), moved

        def branch(gradient):
            return jax.lax.cond(finite, learn, lambda _: (params, state.inner_state), gradient)

        def select(gradient):
            kept = params, state.inner_state
            return jax.tree.map(lambda x, y: jnp.where(finite, x, y), learn(gradient), kept)

        # Both update arrays in place, but only on these platforms: around a branch, the compiler for GPUs copies all
        # parameters and moments (3 x their size); without one, that for CPUs has 3 x the parameters of temporaries.
        new, moved = jax.lax.platform_dependent(gradient, cuda=select, default=branch)
        skipped = 1 - finite.astype(jnp.int32)
        in_a_row, in_all = (state.notfinite_count + 1) * skipped, state.total_notfinite + skipped
        return new, optax.ApplyIfFiniteState(in_a_row, finite, in_all, moved), norm

    def at_rest(self, state: optax.ApplyIfFiniteState) -> optax.ApplyIfFiniteState:
        """Return the state as it is kept while there are no updates."""
        return moments_to_host(state) if self.on_host else state

    def at_work(self, state: optax.ApplyIfFiniteState) -> optax.ApplyIfFiniteState:
        """Return the state as updates need it."""
        return moments_to_device(state) if self.on_host else state

    def rate_used(self, state: optax.ApplyIfFiniteState) -> float:
        """Return the learning rate of the last applied update; before the first, that of the first."""
        return float(_evaluated(self.schedule, np.int32(max(applied_updates(state) - 1, 0))))


def make_optimizer(config: OptimizerConfig, total_updates: int) -> Optimizer:
    """Return AdamW with clipping by global norm, and weight decay on matrices and embeddings only."""
    return _adamw(config, 0 if config.schedule == "constant" else total_updates)


@functools.cache  # one object for equal settings, so that a program that holds it is not traced again
def _adamw(config: OptimizerConfig, total_updates: int) -> Optimizer:
    schedule = make_schedule(config, total_updates)
    moments = optax.scale_by_adam(config.b1, config.b2, config.eps)
    adamw = optax.chain(  # as `optax.adamw`
        in_bfloat16(moments) if config.state == "bfloat16" else moments,
        optax.add_decayed_weights(config.weight_decay, _decayed),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(adamw, config.clip_norm, schedule, on_host=config.state == "host")


def planned_updates(config: Config, objective: Objective, steps: int) -> int:
    """Return the most updates in `steps` steps, which is the length of their schedule."""
    return steps * (config.training.updates_per_step + objective.extra_updates)


@functools.partial(jax.jit, static_argnums=0)
def _evaluated(schedule: optax.Schedule, update: jax.Array) -> jax.Array:
    """Evaluate a schedule in one program instead of one for each of its operations."""
    return schedule(update)


def applied_updates(state: optax.ApplyIfFiniteState) -> int:
    """Return the number of applied updates, by the count of the schedule."""
    counts = optax.tree_utils.tree_get_all_with_path(state.inner_state, "count")
    return max(int(count) for _, count in counts)


def skipped_updates(state: optax.ApplyIfFiniteState) -> tuple[int, int]:
    """Return the number of updates skipped in a row until now, and in total."""
    return int(state.notfinite_count), int(state.total_notfinite)


def _decayed(params):
    """A mask over the parameters: all but norms and biases are decayed."""

    def decayed(path, _):
        parameter = of_path(path)
        return parameter is None or parameter.kind not in ("norm", "bias")

    return jax.tree_util.tree_map_with_path(decayed, params)


def warm_start_config(config: Config) -> OptimizerConfig:
    """Return the run's optimizer settings with the constant learning rate of the warm start."""
    return dataclasses.replace(
        config.optimizer, learning_rate=config.warm_start.learning_rate, schedule="constant", warmup_updates=0
    )
