"""The training step in three parts: score, coefficients, pull back.

  1. score         one forward pass computes log-probs [P, K, T] in microbatches, without a gradient
  2. coefficients  grad(objective) with respect to these arrays, on whole groups
  3. pull back     each microbatch runs again with its slice of the coefficients as the cotangent

The sum over part 3 is the exact gradient of the loss of whole groups, however groups are split into microbatches (chain
rule: the objective depends on the parameters through the token statistics only). In the first update after sampling the
behaviour log-probs replace part 1; `behaviour.py` decides whether they are the sampler's. The layout decides which
tokens run together (`models/packing.py`).

The coefficients are known before part 3, so part 3 runs only what has a signal: a response ends at its last token whose
cotangent is not 0, and a response or a group without such a token does not run. What is left out would have added
exactly 0 to the gradient.

Parts 1 and 3 are the large programs. They are independent of the method, so that all methods share them. Part 2 is a
small program for each method.

Axes: P prompts · K responses · T response tokens.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from lpo_jax.models.placement import constrain_params
from lpo_jax.models.runner import Groups, ModelRunner
from lpo_jax.objectives import Listwise, Objective, Scored, TokenStats
from lpo_jax.parallel.sharding import whole
from lpo_jax.runs.state import TrainState
from lpo_jax.training.optimizer import Optimizer
from lpo_jax.types import PyTree


@functools.partial(jax.jit, static_argnums=0)
def left_out(objective: Objective, scored: Scored) -> jax.Array:
    """Return the groups [P] that a method leaves out whatever the policy is (`Objective.left_out`)."""
    return whole(objective.left_out(scored))


class Signal(struct.PyTreeNode):
    """The output of a method for a minibatch.

    Attributes:
      cotangent: d loss / d statistics; the coefficients are its `logp` `[P, K, T]`.
      view: target, policy and coefficients of each group, for the rollout files.
      metrics: of the objective.
      control: state of the method's control after this update.
      tokens: `[P, K, T]` bool, the tokens with a cotangent other than 0.
    """

    cotangent: TokenStats
    view: Listwise
    metrics: dict[str, jax.Array]
    control: PyTree
    tokens: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def signal(objective: Objective, used: TokenStats, scored: Scored) -> Signal:
    """Compute part 2, and the other outputs of a method for the minibatch.

    Args:
      used: the current statistics, from `score`, or the behaviour log-probs in the first update after sampling.
    """
    gradient, metrics = jax.grad(objective, has_aux=True)(used, scored)
    cotangent = {name: x if name in objective.differentiates else None for name, x in vars(gradient).items()}
    tokens = jnp.zeros(scored.mask.shape, bool)
    for x in jax.tree.leaves(cotangent):
        tokens |= (x != 0).any(axis=tuple(range(3, x.ndim)))
    control = objective.next_control(used, scored)
    # A non-finite control state is dropped, like the optimizer skips the update.
    sound = jax.tree.reduce(lambda ok, x: ok & jnp.isfinite(x).all(), control, jnp.bool_(True))
    control = jax.tree.map(lambda new, old: jnp.where(sound, new, old), control, scored.control)
    view = objective.listwise(used, scored)
    return whole(Signal(TokenStats(**cotangent), view, metrics, control, tokens))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def update(
    runner: ModelRunner,
    optimizer: Optimizer,
    state: TrainState,
    groups: Groups,
    cotangent: TokenStats,
) -> tuple[TrainState, TokenStats, jax.Array]:
    """Compute part 3, then one optimizer step.

    A non-finite gradient changes nothing and is counted.

    Returns:
      The new state, the trainer's statistics at the old state (0 at tokens that did not run), and the norm of the
      gradient.
    """
    gradient, stats = runner.pull_back(state.params, groups, cotangent, state.frozen)
    params, opt_state, norm = optimizer.apply(gradient, state.opt_state, state.params)
    state = constrain_params(runner.config, state.replace(params=params, opt_state=opt_state))
    return state, whole(stats), norm
