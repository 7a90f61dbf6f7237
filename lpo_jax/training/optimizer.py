"""AdamW of optax with a schedule; gradients are clipped, and non-finite ones are skipped and counted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from lpo_jax.config import Config, OptimizerConfig
from lpo_jax.models.decoder import Params
from lpo_jax.models.parameters import of_path
from lpo_jax.objectives import Objective


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
    """An optax transformation with gradient clipping by norm, which skips non-finite gradients.

    Equivalent to `optax.clip_by_global_norm` and `optax.apply_if_finite`, with the latter's state. But the norm is
    computed once for both, and updates are applied as they are computed: a tree of updates, with 4 bytes per parameter,
    is never in memory.

    Attributes:
      rule: computes updates from gradients.
      clip_norm: largest norm of a gradient; 0 disables clipping.
      schedule: the rule's learning rate by update.
    """

    rule: optax.GradientTransformation
    clip_norm: float = 0.0
    schedule: optax.Schedule | None = None

    def init(self, params: Params) -> optax.ApplyIfFiniteState:
        count = lambda: jnp.zeros([], jnp.int32)  # noqa: E731 - separate arrays, because both are donated
        return optax.ApplyIfFiniteState(count(), jnp.array(True), count(), self.rule.init(params))

    def apply(
        self, gradient: Params, state: optax.ApplyIfFiniteState, params: Params
    ) -> tuple[Params, optax.ApplyIfFiniteState, jax.Array]:
        """Return the new parameters, the new state and the gradient's norm.

        If the norm is not finite, the parameters are unchanged and the state counts a skipped update.
        """
        norm = optax.global_norm(gradient)
        finite = jnp.isfinite(norm)

        def learn(gradient):
            if self.clip_norm:
                scale = jnp.minimum(1.0, self.clip_norm / norm)
                gradient = jax.tree.map(lambda g: g * scale, gradient)
            updates, moved = self.rule.update(gradient, state.inner_state, params)
            return optax.apply_updates(params, updates), moved

        new, moved = jax.lax.cond(finite, learn, lambda _: (params, state.inner_state), gradient)
        skipped = 1 - finite.astype(jnp.int32)
        in_a_row, in_all = (state.notfinite_count + 1) * skipped, state.total_notfinite + skipped
        return new, optax.ApplyIfFiniteState(in_a_row, finite, in_all, moved), norm

    def rate_used(self, state: optax.ApplyIfFiniteState) -> float:
        """Return the learning rate of the last applied update, or of the first one if none was applied."""
        return float(self.schedule(max(applied_updates(state) - 1, 0)))


@functools.cache  # equal settings give the same object, so that programs that use it are not traced again
def make_optimizer(config: OptimizerConfig, total_updates: int) -> Optimizer:
    """Make AdamW with clipping by global norm, float32 moments, and decoupled weight decay on matrices only."""
    schedule = make_schedule(config, total_updates)
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return Optimizer(adamw, config.clip_norm, schedule)


def planned_updates(config: Config, objective: Objective, steps: int) -> int:
    """Return the maximum number of updates in `steps` steps, which is the length of the schedule."""
    return steps * (config.training.updates_per_step + objective.extra_updates)


def applied_updates(state: optax.ApplyIfFiniteState) -> int:
    """Return the number of updates applied so far, which is the position in the schedule."""
    counts = optax.tree_utils.tree_get_all_with_path(state.inner_state, "count")
    return int(max(count for _, count in counts))


def skipped_updates(state: optax.ApplyIfFiniteState) -> tuple[int, int]:
    """Return the number of updates skipped in a row up to now, and in total."""
    return int(state.notfinite_count), int(state.total_notfinite)


def _decayed(params):
    """Return a mask over the parameters: all except norms and biases are decayed."""

    def decayed(path, _):
        parameter = of_path(path)
        return parameter is None or parameter.kind not in ("norm", "bias")

    return jax.tree_util.tree_map_with_path(decayed, params)


def warm_start_config(config: Config) -> OptimizerConfig:
    """Return the optimizer settings of the warm start: those of the run with a constant learning rate of its own."""
    return dataclasses.replace(
        config.optimizer, learning_rate=config.warm_start.learning_rate, schedule="constant", warmup_updates=0
    )
