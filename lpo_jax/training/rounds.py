"""One sampling round: prompts drawn, responses sampled and verified, hooks heard, arrays made for the objective.

Axes: P prompts · K responses · T response tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax import tasks
from lpo_jax.models.decoder import Params
from lpo_jax.models.lora import join
from lpo_jax.objectives import Scored, TokenStats
from lpo_jax.objectives.fields import Field, Source, fields_from
from lpo_jax.objectives.method import Objective
from lpo_jax.rollout.collect import Collected
from lpo_jax.rollout.collect import join as join_batches
from lpo_jax.rollout.hooks import Round, RunHook, Tools
from lpo_jax.sampling.padding import bucket, pad_to
from lpo_jax.training.batch import Groups, Rollouts
from lpo_jax.training.behaviour import choose
from lpo_jax.training.observe import observed
from lpo_jax.training.optimizer import Optimizer, make_optimizer, planned_updates
from lpo_jax.training.session import Session
from lpo_jax.training.step import Program, TrainState, gap, score


@dataclasses.dataclass(frozen=True)
class Learner:
    """What a run learns by: the objective, its hooks at work, how the model is run, and the optimizer.

    Attributes:
      schedule_steps: steps that the learning rate's schedule and `progress` run over.
      rescores: whether behaviour log-probs are the trainer's.
    """

    objective: Objective
    hooks: Sequence[RunHook]
    program: Program
    optimizer: Optimizer
    schedule_steps: int
    rescores: bool

    @classmethod
    def of(
        cls, session: Session, objective: Objective, hooks: Sequence[RunHook], schedule_steps: int
    ) -> "Learner":
        """That of a run."""
        config = session.config
        updates = planned_updates(config, objective, schedule_steps)
        return cls(
            objective,
            hooks,
            session.program(config.sampling.temperature, objective),
            make_optimizer(config.optimizer, updates),
            schedule_steps,
            choose(config, objective).rescored,
        )

    def progress(self, step: int) -> float:
        """How far the run is at `step` (from 1): 0 at the first step that the schedule covers, 1 from its last on."""
        return min((step - 1) / max(self.schedule_steps - 1, 1), 1.0)

    def metrics(self) -> dict[str, float]:
        """What the hooks have to report of the last round."""
        return {name: value for hook in self.hooks for name, value in hook.metrics().items()}

    def state(self) -> list[Any]:
        """JSON, of all hooks."""
        return [hook.state() for hook in self.hooks]

    def restore(self, states: Sequence[Any]) -> None:
        """Continues from `state()`."""
        for hook, state in zip(self.hooks, states, strict=True):
            hook.restore(state)


def scores_first(objective: Objective) -> bool:
    """Whether an objective needs statistics that only a forward pass gives, and not the sampler."""
    return bool(objective.needs & fields_from(Source.POLICY, Source.POLICY_EXTRA))


def sample_round(
    session: Session, learner: Learner, params: Params, data: tasks.PromptIterator, step: int
) -> tuple[Round, Tools]:
    """Samples, mends and selects the groups of a step, phase by phase (`hooks/base.py`).

    Returns:
      The round to learn from, and the tools of its step.
    """
    tools = Tools(session, learner.program, step, params, session.prepare(params))
    sampled: list[Collected] = []
    for hook in learner.hooks:
        hook.begin()

    def more() -> Round | None:
        """A further round of prompts that the step has not seen yet."""
        seen = {row for batch in sampled for row in batch.ids}
        rows = next(data)
        wanted = len(rows)
        for hook in learner.hooks:
            rows = hook.draw(rows, step, seen)
        rows = [row for row in rows if row[0] not in seen]
        if not rows:
            return None
        sampled.append(tools.sample(rows, at_least=wanted))
        round = Round(sampled[-1])
        for hook in learner.hooks:
            hook.mend(round, tools)
        return round

    round = more()
    for hook in learner.hooks:
        hook.select(round, more)
    everything = join_batches(sampled)
    for hook in learner.hooks:
        hook.observe(everything)
    return round, tools


def make_rollouts(round: Round, max_tokens: int, progress: float) -> Rollouts:
    """What was sampled, padded to a bucket of response tokens, as the arrays an update takes."""
    batch, responses = round.batch, round.batch.responses
    T = bucket(responses.tokens.shape[-1], max_tokens)
    tokens = pad_to(responses.tokens, T)
    scored = Scored(
        behaviour_logp=pad_to(responses.log_probs, T),
        rewards=batch.rewards,
        mask=pad_to(responses.mask, T),
        valid=batch.valid,
        passed=batch.passed,
        malformed=batch.malformed,
        truncated=~responses.finished,
        token_ids=tokens,
        clusters=clusters(batch),
        progress=np.float32(progress),
    )
    return Rollouts(Groups(batch.prompts, batch.prompt_lengths, tokens), scored)


def complete(
    learner: Learner, rollouts: Rollouts, round: Round, tools: Tools
) -> tuple[Rollouts, dict[str, float]]:
    """What the objective needs beyond the samples, from the model before its first update.

    Returns:
      The rollouts, and the sampler's gap to the trainer where behaviour log-probs are the trainer's.
    """
    groups, scored, gaps = rollouts.groups, rollouts.scored, {}
    if learner.rescores or round.rescore:
        by_trainer = rescored(learner, rollouts, tools)
        if not round.rescore:
            found = gap(TokenStats(scored.behaviour_logp), TokenStats(by_trainer), scored.mask)
            gaps = {name: float(value) for name, value in found.items()}
        scored = scored.replace(behaviour_logp=by_trainer, sampler_logp=scored.behaviour_logp)
    rollouts = packed(learner, rollouts)
    wanted = learner.objective.needs & fields_from(Source.OBSERVATION)
    if wanted:
        seen = observed(learner.program, tools.params, rollouts.groups, scored.mask)
        scored = scored.replace(**{name: seen[name] for name in wanted})
    rollouts = rollouts.replace(scored=scored)
    for hook in learner.hooks:
        extra = hook.annotate(rollouts, round.batch, tools)
        rollouts = rollouts.replace(scored=rollouts.scored.replace(**extra))
    teacher = rollouts.scored.teacher
    if teacher is not None:
        groups = groups.replace(top_ids=teacher.ids)
    return rollouts.replace(groups=groups), gaps


def rescored(learner: Learner, rollouts: Rollouts, tools: Tools) -> jax.Array:
    """The trainer's log-probs `[P, K, T]` of a round.

    Scored minibatch by minibatch, as the updates score the same tokens later: one compiled program, the same tokens
    side by side, and so the same rounding. A policy that has not moved has a log-ratio of exactly 0.
    """
    parts = split(rollouts, tools.session.config.training.updates_per_step)
    scores = [score(learner.program, tools.params, packed(learner, part).groups).logp for part in parts]
    return jnp.concatenate(scores)


def packed(learner: Learner, rollouts: Rollouts) -> Rollouts:
    """The same, laid out by its real tokens."""
    return rollouts.replace(groups=learner.program.pack(rollouts.groups, rollouts.scored.mask))


def current_stats(learner: Learner, state: TrainState, rollouts: Rollouts, first: bool) -> TokenStats:
    """The policy's statistics before an update of a minibatch.

    In the first update after sampling the behaviour log-probs are the policy's own and stand in.
    """
    used = TokenStats(rollouts.scored.behaviour_logp)
    if scores_first(learner.objective) or not first:
        scored = score(learner.program, state.policy, rollouts.groups)
        used = scored.replace(logp=used.logp) if first else scored
    if Field.REF_LOGP in learner.objective.needs:
        reference = join(state.frozen, state.reference)
        used = used.replace(ref_logp=score(learner.program, reference, rollouts.groups).logp)
    return used


def split(rollouts: Rollouts, parts: int) -> list[Rollouts]:
    """A round's prompts as equal minibatches of whole groups; what is no array of prompts goes to each."""
    size = rollouts.groups.prompts.shape[0] // parts
    cut = lambda x, i: x[i * size : (i + 1) * size] if np.ndim(x) else x  # noqa: E731
    return [jax.tree.map(lambda x, i=i: cut(x, i), rollouts) for i in range(parts)]


def clusters(batch: Collected) -> np.ndarray:
    """`[P, K]` int32: equal final answers of a group share a number; -1 where the verifier saw no answer."""
    numbers = np.full(batch.rewards.shape, -1, np.int32)
    for p, group in enumerate(batch.verdicts):
        seen: dict[str, int] = {}
        for k, verdict in enumerate(group):
            answer = verdict.parts.get("answer")
            if answer not in (None, ""):
                numbers[p, k] = seen.setdefault(str(answer), len(seen))
    return numbers
