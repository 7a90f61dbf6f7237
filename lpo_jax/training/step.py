"""The training step in three parts: score, coefficients, pull back.

  1. score         one forward pass gives log-probs [P, K, T], microbatch by microbatch, no gradient
  2. coefficients  grad(objective) on those arrays, whole groups in view
  3. pull back     each microbatch runs again with its slice of the coefficients as the cotangent

The sum of part 3 is the exact gradient of the whole group's loss, however groups are cut into microbatches
(chain rule: the objective reaches the parameters through the token statistics only). In the first update after
sampling the sampler's log-probs stand in for part 1, so nothing is computed twice.

Parts 1 and 3 are the large programs; they do not know the method, so that all methods share them. Part 2 is a
small one for each method.

Axes: P prompts · K responses · S prompt tokens · T response tokens · J likeliest tokens · M microbatches · D width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lpo_jax.models import decoder
from lpo_jax.models.attention import SharedPrefix
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.head import token_log_probs, top_tokens
from lpo_jax.objectives import Listwise, Objective, Scored, Teacher, TokenStats
from lpo_jax.training.batch import Groups, Microbatches

# Statistics beyond log-prob and entropy, which every pass gives; the model computes them for the methods that ask.
EXTRA_STATS = ("collision", "hidden_norm")


@struct.dataclass
class TrainState:
    """What an update changes, and what goes with it into a checkpoint.

    Attributes:
      opt_state: holds the count of updates and of skipped ones too.
      control: the state of the method's own control; None for a method without one.
      reference: the frozen parameters that a penalty is measured from; None where none is used.
    """

    params: decoder.Params
    opt_state: Any
    control: Any = None
    reference: decoder.Params | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """How the model is run over a batch; hashable, so that it can be static under jit.

    Attributes:
      temperature: the sampler's; scores are of the distribution that was sampled from.
      token_budget: most tokens, padding included, in one microbatch.
      extra: which of `EXTRA_STATS` to compute.
    """

    config: ModelConfig
    temperature: float = 1.0
    token_budget: int = 8192
    dtype: Any = jnp.float32
    remat: bool = True
    extra: tuple[str, ...] = ()

    def predicting(self, params: decoder.Params, groups: Groups) -> tuple[jax.Array, jax.Array]:
        """States `[P, K, T, D]` that each response token is predicted from, and the prompts' `[P, S, D]`.

        The prompt is computed once per group.
        """
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
        return jnp.concatenate([first, own[:, :, :-1]], axis=2), hidden[:, :S]

    def token_stats(self, params: decoder.Params, groups: Groups) -> TokenStats:
        """What the model says about every response token; `[P, K, T]` each."""
        P, K, T = groups.responses.shape
        states, _ = self.predicting(params, groups)
        rows = lambda x: x.reshape(P * K * T, *x.shape[3:])  # noqa: E731
        stats = token_log_probs(
            rows(states),
            decoder.unembedding(params),
            rows(groups.responses),
            self.temperature,
            top_ids=None if groups.top_ids is None else rows(groups.top_ids),
            collision="collision" in self.extra,
        )
        if "hidden_norm" in self.extra:
            stats["hidden_norm"] = jnp.linalg.norm(rows(states).astype(jnp.float32), axis=-1)
        return TokenStats(**{name: x.reshape(P, K, T, *x.shape[1:]) for name, x in stats.items()})

    def plan(self, groups: Groups) -> Microbatches:
        """How this batch is cut."""
        P, K, T = groups.responses.shape
        return Microbatches.plan(P, K, groups.prompts.shape[1], T, self.token_budget)

    def over_microbatches(self, function, groups: Groups):
        """`function(piece)` for every microbatch, its leaves `[p, k, ...]` joined to `[P, K, ...]`."""
        cut, K = self.plan(groups), groups.responses.shape[1]
        return jax.tree.map(lambda x: cut.join(x, K), jax.lax.map(function, cut.split_groups(groups)))

    def pull_back(
        self, params: decoder.Params, groups: Groups, cotangent: TokenStats
    ) -> tuple[decoder.Params, TokenStats]:
        """Part 3: the gradient (float32), and the statistics the model gave on the way.

        Args:
          cotangent: d loss / d statistics; a statistic that is None there has no say.
        """
        cut, K = self.plan(groups), groups.responses.shape[1]

        def piece(total, xs):
            tokens, given = xs
            stats, vjp = jax.vjp(lambda p: self.token_stats(p, tokens), params)
            full = {
                name: None if value is None else jnp.zeros_like(value) if given[name] is None else given[name]
                for name, value in vars(stats).items()
            }
            (gradient,) = vjp(TokenStats(**full))
            return jax.tree.map(jnp.add, total, gradient), stats

        zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        given = jax.tree.map(cut.split, vars(cotangent))
        gradient, stats = jax.lax.scan(piece, zero, (cut.split_groups(groups), given))
        return gradient, jax.tree.map(lambda x: cut.join(x, K), stats)


@functools.partial(jax.jit, static_argnums=0)
def score(program: Program, params: decoder.Params, groups: Groups) -> TokenStats:
    """Part 1: the trainer's statistics `[P, K, T]` of given responses."""
    return program.over_microbatches(lambda piece: program.token_stats(params, piece), groups)


@functools.partial(jax.jit, static_argnums=(0, 1))
def likeliest(program: Program, count: int, params: decoder.Params, groups: Groups) -> Teacher:
    """The `count` likeliest tokens at every place of given responses, as a teacher for all of them."""

    def piece(groups: Groups):
        states, _ = program.predicting(params, groups)
        rows = states.reshape(-1, states.shape[-1])
        top = top_tokens(rows, decoder.unembedding(params), count, program.temperature)
        return {name: x.reshape(*groups.responses.shape, *x.shape[1:]) for name, x in top.items()}

    top = program.over_microbatches(piece, groups)
    return Teacher(**top, valid=jnp.ones(groups.responses.shape[:2], bool))


@struct.dataclass
class Signal:
    """What a method makes of a minibatch.

    Attributes:
      cotangent: d loss / d statistics; the coefficients are its `logp` `[P, K, T]`.
      view: target, policy and coefficients of each group, for the rollout files.
      metrics: the objective's.
      control: the state of the method's control after this update.
    """

    cotangent: TokenStats
    view: Listwise
    metrics: dict[str, jax.Array]
    control: Any


@functools.partial(jax.jit, static_argnums=0)
def signal(objective: Objective, used: TokenStats, scored: Scored) -> Signal:
    """Part 2, with everything else that a method has to say about the minibatch.

    Args:
      used: the current statistics: from `score`, or the sampled log-probs in the first update after sampling.
    """
    gradient, metrics = jax.grad(objective, has_aux=True)(used, scored)
    cotangent = {name: x if name in objective.differentiates else None for name, x in vars(gradient).items()}
    control = objective.next_control(used, scored)
    # A broken model must not spoil a state that outlives it: the optimizer skips such an update too.
    sound = jax.tree.reduce(lambda ok, x: ok & jnp.isfinite(x).all(), control, jnp.bool_(True))
    control = jax.tree.map(lambda new, old: jnp.where(sound, new, old), control, scored.control)
    return Signal(TokenStats(**cotangent), objective.listwise(used, scored), metrics, control)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def update(
    program: Program,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    groups: Groups,
    cotangent: TokenStats,
) -> tuple[TrainState, TokenStats, jax.Array]:
    """Part 3, then one optimizer step.

    A gradient that is not finite changes nothing (`optax.apply_if_finite`) and is counted.

    Returns:
      The new state, the trainer's statistics at the old one, and the norm of the gradient.
    """
    gradient, stats = program.pull_back(state.params, groups, cotangent)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(params=params, opt_state=opt_state), stats, optax.global_norm(gradient)


@jax.jit
def token_metrics(used: TokenStats, stats: TokenStats, mask: jax.Array) -> dict[str, jax.Array]:
    """Entropy, and the gap between `used` and the trainer's log-probs: the sampler's in a round's first update."""
    tokens = jnp.maximum(mask.sum(), 1)
    return {"actor/entropy": jnp.where(mask, stats.entropy, 0.0).sum() / tokens, **gap(used, stats, mask)}


@jax.jit
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
