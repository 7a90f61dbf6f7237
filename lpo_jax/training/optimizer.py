"""AdamW with schedule and clipping, from optax; a gradient that is not finite is skipped and counted."""

import dataclasses
import functools

import jax
import optax

from lpo_jax.config import Config, OptimizerConfig

# optax.apply_if_finite applies a bad update once it has seen this many in a row; the loop stops long before.
NEVER = 2**30


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up, then constant, linear or cosine decay to `final_fraction`."""
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


@functools.cache  # one object for equal settings, so that a program that holds it is not traced again
def make_optimizer(config: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam moments in float32, decoupled weight decay on matrices only."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        make_schedule(config, total_updates),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return optax.apply_if_finite(optax.chain(clip, adamw), NEVER)


def skipped_updates(opt_state: optax.ApplyIfFiniteState) -> tuple[int, int]:
    """Updates skipped in a row up to now, and in all."""
    return int(opt_state.notfinite_count), int(opt_state.total_notfinite)


def _decayed(params):
    """Norm weights and biases are not decayed (their arrays are stacked on L, so names tell, not ranks)."""

    def is_matrix(path, _):
        name = str(path[-1].key)
        return not (name.endswith("norm") or name in ("bq", "bk", "bv"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def learning_rate(config: OptimizerConfig, total_updates: int, update: int) -> float:
    """The rate that update number `update` (from 0) of a run without skipped ones uses."""
    return float(make_schedule(config, total_updates)(update))


def warm_start_config(config: Config) -> OptimizerConfig:
    """The run's optimizer with the warm start's own learning rate, constant."""
    return dataclasses.replace(
        config.optimizer, learning_rate=config.warm_start.learning_rate, schedule="constant", warmup_updates=0
    )
