"""What turns a batch into an update: the objective with its hooks, the model's runner, and the optimizer.

Axes: P prompts · K responses · T response tokens.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.models.lora import with_adapters
from lpo_jax.models.placement import committed
from lpo_jax.models.runner import Groups, ModelRunner, log_prob_gap, score
from lpo_jax.objectives import TokenStats
from lpo_jax.objectives.batch import Field, Source, fields_from
from lpo_jax.objectives.method import Objective
from lpo_jax.rollout.batch import Batch
from lpo_jax.rollout.collect import Rollouts
from lpo_jax.rollout.hooks import RunHook, Tools
from lpo_jax.runs.learned import Learned
from lpo_jax.runs.state import TrainState
from lpo_jax.training.behaviour import choose_behaviour
from lpo_jax.training.features import round_features
from lpo_jax.training.measure import over_updates
from lpo_jax.training.model import TrainedModel
from lpo_jax.training.optimizer import Optimizer, make_optimizer, planned_updates
from lpo_jax.training.step import left_out, signal, update
from lpo_jax.types import Json, PyTree


@dataclasses.dataclass(frozen=True)
class Learner:
    """How a run learns.

    Attributes:
      updates_per_step: minibatches that a batch is split into.
      schedule_steps: steps that the learning rate's schedule and `progress` extend over.
      rescores: whether the trainer computes the behaviour log-probs.
      signal_only: whether only the responses are scored and updated whose log-probs and gradients are needed.
      stale: whether the behaviour policy may be older than the policy at the first update of a step.
    """

    objective: Objective
    hooks: Sequence[RunHook]
    runner: ModelRunner
    optimizer: Optimizer
    updates_per_step: int
    schedule_steps: int
    rescores: bool
    signal_only: bool
    stale: bool

    @classmethod
    def of(
        cls, model: TrainedModel, objective: Objective, hooks: Sequence[RunHook], schedule_steps: int
    ) -> "Learner":
        """The learner of a run."""
        config = model.config
        updates = planned_updates(config, objective, schedule_steps)
        rescores = choose_behaviour(config, objective).rescored
        return cls(
            objective,
            hooks,
            model.runner(config.sampling.temperature, objective),
            make_optimizer(config.optimizer, updates),
            config.training.updates_per_step,
            schedule_steps,
            rescores,
            config.training.pull_back == "signal",
            config.sampling.ahead > 0 and not rescores,
        )

    def progress(self, step: int) -> float:
        """Progress at `step` (from 1): 0 at the first step of the schedule, 1 from its last step on."""
        return min((step - 1) / max(self.schedule_steps - 1, 1), 1.0)

    def metrics(self) -> dict[str, float]:
        """Metrics of all hooks for the last step."""
        return {name: value for hook in self.hooks for name, value in hook.metrics().items()}

    def state(self) -> list[Json]:
        """States of all hooks, as JSON."""
        return [hook.state() for hook in self.hooks]

    def restore(self, states: Sequence[PyTree]) -> None:
        """Restore the hooks from `state()`."""
        for hook, state in zip(self.hooks, states, strict=True):
            hook.restore(state)

    def pack(self, batch: Batch) -> Batch:
        """The batch with a layout that packs its real tokens into rows."""
        return batch.replace(groups=self.runner.pack(batch.groups, batch.scored.mask))


def scores_first(objective: Objective) -> bool:
    """Whether an objective needs token statistics that the sampler does not compute, even in the first update."""
    return bool(objective.needs & fields_from(Source.POLICY, Source.POLICY_EXTRA))


def to_score(learner: Learner, batch: Batch) -> tuple[Groups, np.ndarray]:
    """Select the responses of a packed batch to score: all but those of groups that the objective leaves out.

    Returns:
      The groups with a layout of the tokens to score, and these tokens `[P, K, T]`.
    """
    mask = np.asarray(batch.scored.mask, bool)
    # With "keep", only groups that are too small are left out. They are rare, so they are scored all the same.
    if not learner.signal_only or learner.objective.degenerate == "keep":
        return batch.groups, mask
    tokens = mask & ~jax.device_get(left_out(learner.objective, batch.scored))[:, None, None]
    return learner.runner.pack(batch.groups, tokens), tokens


def complete_batch(
    learner: Learner, batch: Batch, rollouts: Rollouts, tools: Tools
) -> tuple[Batch, dict[str, float]]:
    """Add the fields that the objective needs from forward passes of the policy, before its first update.

    Returns:
      The batch, and metrics of the log-prob gap between sampler and trainer, if the trainer computes the behaviour
      log-probs.
    """
    groups, scored, gaps = batch.groups, batch.scored, {}
    if learner.rescores or rollouts.rescore:
        by_trainer, tokens = behaviour_log_probs(learner, batch, tools)
        if not rollouts.rescore:
            found = log_prob_gap(TokenStats(scored.behaviour_logp), TokenStats(by_trainer), tokens)
            gaps = {name: float(value) for name, value in found.items()}
        scored = scored.replace(behaviour_logp=by_trainer, sampler_logp=scored.behaviour_logp)
    batch = learner.pack(batch)
    wanted = learner.objective.needs & fields_from(Source.OBSERVATION)
    if wanted:
        seen = round_features(learner.runner, tools.params, batch.groups, scored.mask)
        scored = scored.replace(**{name: seen[name] for name in wanted})
    batch = batch.replace(scored=scored)
    for hook in learner.hooks:
        extra = hook.annotate(batch, rollouts, tools)
        batch = batch.replace(scored=batch.scored.replace(**extra))
    teacher = batch.scored.teacher
    if teacher is not None:
        groups = groups.replace(top_ids=teacher.ids)
    return batch.replace(groups=groups), gaps


def behaviour_log_probs(learner: Learner, batch: Batch, tools: Tools) -> tuple[jax.Array, np.ndarray]:
    """The log-probs `[P, K, T]` of the batch under its behaviour policy, and the tokens where they are the trainer's.

    Computed minibatch by minibatch, with the programs and the layouts that the updates score the same tokens with
    later, and therefore with the same rounding: a policy that has not changed has a log-ratio of exactly 0.
    """
    parts = [learner.pack(part) for part in batch.split(learner.updates_per_step)]
    groups, tokens = zip(*(to_score(learner, part) for part in parts))
    by_trainer = jnp.concatenate([score(learner.runner, tools.params, part).logp for part in groups])
    scored = np.concatenate(tokens)
    return jnp.where(scored, by_trainer, batch.scored.behaviour_logp), scored


def current_stats(learner: Learner, state: TrainState, batch: Batch, first: bool) -> TokenStats:
    """The policy's token statistics before an update on a minibatch: log-probs, and what the objective needs.

    Without the others, the first update and the later ones share the program of `signal`. Tokens that are not scored
    keep the log-probs of the behaviour policy.

    Args:
      first: whether this is the first update after sampling by this policy, when the behaviour log-probs are its own
        and need not be computed again.
    """
    # Committed as those of `score` are, so that all updates have one program.
    used = TokenStats(committed(batch.scored.behaviour_logp))
    again, compared = scores_first(learner.objective) or not first, Field.REF_LOGP in learner.objective.needs
    if not again and not compared:
        return used
    groups, tokens = to_score(learner, batch)
    if again:
        scored = score(learner.runner, state.policy, groups)
        needed = {name: x for name, x in vars(scored).items() if name in learner.objective.needs}
        logp = used.logp if first else jnp.where(tokens, scored.logp, used.logp)
        used = TokenStats(**{"logp": logp, **needed})
    if compared:
        reference = with_adapters(state.frozen, state.reference)
        used = used.replace(ref_logp=score(learner.runner, reference, groups).logp)
    return used


def take_step(
    learner: Learner, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, float], list[Learned]]:
    """All updates of a step: one on each minibatch of the batch, and those that hooks replay.

    Returns:
      The new state, the metrics of the updates, and what each of them computed about its minibatch.
    """
    minibatches = batch.split(learner.updates_per_step)
    replayed = [extra for hook in learner.hooks if (extra := hook.replay(batch)) is not None]
    metrics, learned = [], []
    state = state.replace(opt_state=learner.optimizer.at_work(state.opt_state))
    for index, minibatch in enumerate([*minibatches, *replayed]):
        minibatch = learner.pack(minibatch)
        scored = minibatch.scored.replace(control=state.control)
        used = current_stats(learner, state, minibatch, first=index == 0 and not learner.stale)
        found = signal(learner.objective, used, scored)
        tokens = jax.device_get(found.tokens if learner.signal_only else scored.mask)
        groups = learner.runner.pack(minibatch.groups, tokens)
        state, stats, norm = update(learner.runner, learner.optimizer, state, groups, found.cotangent)
        state = state.replace(control=found.control)
        run = groups.layout.num_tokens / max(minibatch.groups.layout.num_tokens, 1)
        ran = scored.mask & groups.layout.ran
        # With a stale behaviour policy, `used` are the trainer's log-probs, and there is nothing to compare.
        gap = {} if learner.stale else log_prob_gap(used, stats, ran)
        metrics.append(found.metrics | gap | {"actor/grad_norm": norm, "perf/signal_fraction": run})
        logp = jnp.where(ran, stats.logp, jnp.nan)
        learned.append(Learned(found.view, scored.mask, scored.behaviour_logp, used.logp, logp))
    # An update is dispatched as soon as its coefficients are known; this waits for the last one.
    of_updates = over_updates(jax.device_get(metrics))
    state = state.replace(opt_state=learner.optimizer.at_rest(state.opt_state))
    return state, of_updates, learned[: len(minibatches)]
