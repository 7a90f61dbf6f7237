"""The training step in three parts: score, coefficients, pull back.

  1. score         one forward pass gives log-probs [P, K, T], microbatch by microbatch, no gradient
  2. coefficients  grad(objective) on those arrays, whole groups in view
  3. pull back     each microbatch runs again with its slice of the coefficients as the cotangent

The sum of part 3 is the exact gradient of the whole group's loss, however groups are cut into microbatches
(chain rule: the objective reaches the parameters through the log-probs only). In the first update after
sampling the sampler's log-probs stand in for part 1, so nothing is computed twice.

Axes: P prompts · K responses · S prompt tokens · T response tokens · M microbatches · D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lpo_jax.models import decoder
from lpo_jax.models.attention import SharedPrefix
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.head import token_log_probs
from lpo_jax.objectives import Scored, TokenStats
from lpo_jax.training.batch import Groups, Microbatches, Rollouts

Objective = Callable[[TokenStats, Scored], tuple[jax.Array, dict[str, jax.Array]]]


@struct.dataclass
class TrainState:
    """What an update changes. The optimizer's state holds the count of updates and of skipped ones."""

    params: decoder.Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Update:
    """Everything about an update that is fixed for a run; hashable, so that it can be static under jit.

    Attributes:
      temperature: the sampler's; scores are of the distribution that was sampled from.
      token_budget: most tokens, padding included, in one microbatch.
    """

    config: ModelConfig
    objective: Objective
    optimizer: optax.GradientTransformation
    temperature: float = 1.0
    token_budget: int = 8192
    dtype: Any = jnp.float32
    remat: bool = True

    def token_stats(self, params: decoder.Params, groups: Groups) -> tuple[jax.Array, jax.Array]:
        """Log-probs and entropies `[P, K, T]` of the responses, the prompt computed once per group."""
        P, S = groups.prompts.shape
        _, K, T = groups.responses.shape
        row = jnp.concatenate([groups.prompts, groups.responses.reshape(P, K * T)], axis=1)
        context = SharedPrefix(groups.lengths, S, K, window=self.config.sliding_window)
        positions = context.positions(S + K * T)
        hidden, _ = decoder.forward(
            self.config, params, row, positions, context, dtype=self.dtype, remat=self.remat
        )
        # Token t of a response is predicted by token t - 1, the first one by the prompt's last token.
        last = jnp.take_along_axis(hidden[:, :S], (groups.lengths - 1)[:, None, None], axis=1)  # [P, 1, D]
        own = hidden[:, S:].reshape(P, K, T, -1)
        first = jnp.broadcast_to(last[:, None], (P, K, 1, own.shape[-1]))
        predicting = jnp.concatenate([first, own[:, :, :-1]], axis=2)
        logp, entropy = token_log_probs(
            predicting.reshape(P * K * T, -1),
            decoder.unembedding(params),
            groups.responses.reshape(-1),
            self.temperature,
        )
        return logp.reshape(P, K, T), entropy.reshape(P, K, T)

    def plan(self, groups: Groups) -> Microbatches:
        """How this batch is cut."""
        P, K, T = groups.responses.shape
        return Microbatches.plan(P, K, groups.prompts.shape[1], T, self.token_budget)

    def score(self, params: decoder.Params, groups: Groups) -> TokenStats:
        """Part 1."""
        cut = self.plan(groups)
        logp, _ = jax.lax.map(lambda piece: self.token_stats(params, piece), cut.split_groups(groups))
        return TokenStats(cut.join(logp, groups.responses.shape[1]))

    def coefficients(self, stats: TokenStats, scored: Scored) -> jax.Array:
        """Part 2: d loss / d log-prob `[P, K, T]`."""
        return jax.grad(lambda stats: self.objective(stats, scored)[0])(stats).logp

    def pull_back(
        self, params: decoder.Params, groups: Groups, coefficients: jax.Array
    ) -> tuple[decoder.Params, TokenStats]:
        """Part 3: the gradient (float32), and the statistics the model gave on the way."""
        cut = self.plan(groups)

        def piece(total, xs):
            tokens, cotangent = xs
            (logp, entropy), vjp = jax.vjp(lambda p: self.token_stats(p, tokens), params)
            (gradient,) = vjp((cotangent, jnp.zeros_like(entropy)))
            return jax.tree.map(jnp.add, total, gradient), (logp, entropy)

        zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        gradient, stats = jax.lax.scan(piece, zero, (cut.split_groups(groups), cut.split(coefficients)))
        return gradient, TokenStats(*(cut.join(x, groups.responses.shape[1]) for x in stats))


@functools.partial(jax.jit, static_argnums=0)
def score(setup: Update, params: decoder.Params, groups: Groups) -> TokenStats:
    """Part 1 on its own: the trainer's log-probs `[P, K, T]` of given responses."""
    return setup.score(params, groups)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(setup: Update, state: TrainState, rollouts: Rollouts, used: TokenStats):
    """Parts 2 and 3, then one optimizer step.

    A gradient that is not finite changes nothing (`optax.apply_if_finite`) and is counted.

    Args:
      rollouts: a minibatch of whole groups.
      used: the current log-probs: from `score`, or the sampled ones in the first update after sampling.

    Returns:
      The new state, and metrics (scalars, float32): the objective's own at the trainer's log-probs, entropy,
      gradient norm, and the gap between `used` and the trainer's log-probs, which is the sampler-to-trainer
      gap in the first update.
    """
    scored = rollouts.scored
    gradient, stats = setup.pull_back(state.params, rollouts.groups, setup.coefficients(used, scored))
    updates, opt_state = setup.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    _, metrics = setup.objective(stats, scored)
    tokens = jnp.maximum(scored.mask.sum(), 1)
    over_tokens = lambda x: jnp.sum(jnp.where(scored.mask, x, 0.0)) / tokens  # noqa: E731
    metrics = metrics | {
        "actor/entropy": over_tokens(stats.entropy),
        "actor/grad_norm": optax.global_norm(gradient),
        **gap(used, stats, scored.mask),
    }
    return TrainState(params, opt_state), metrics


def gap(sampled: TokenStats, scored: TokenStats, mask: jax.Array) -> dict[str, jax.Array]:
    """How far two sets of log-probs of the same tokens are apart; the first alarm of any masking bug."""
    tokens = jnp.maximum(mask.sum(), 1)
    logp = jnp.where(mask, jnp.abs(sampled.logp - scored.logp), 0.0)
    prob = jnp.where(mask, jnp.abs(jnp.exp(sampled.logp) - jnp.exp(scored.logp)), 0.0)
    return {
        "lpo/logp_gap_mean": logp.sum() / tokens,
        "lpo/logp_gap_max": logp.max(),
        "training/rollout_probs_diff_mean": prob.sum() / tokens,
        "training/rollout_probs_diff_max": prob.max(),
    }
