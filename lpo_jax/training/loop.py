"""Reinforcement learning: sample, verify, project, learn.

`take_step` is one training step from top to bottom; `train` is the run around it.

Axes: P prompts · K responses · T response tokens.
"""

import dataclasses
import time

import jax

from lpo_jax import tasks
from lpo_jax.config import Config
from lpo_jax.errors import Diverged, UserError
from lpo_jax.parallel import hosts
from lpo_jax.rollout.hooks import open_hooks
from lpo_jax.runs.directory import RunDirectory, Signals
from lpo_jax.training import measure
from lpo_jax.training.behaviour import choose
from lpo_jax.training.intro import introduce
from lpo_jax.training.optimizer import skipped_updates
from lpo_jax.training.position import Position, Recorder
from lpo_jax.training.rounds import (
    Learner,
    complete,
    current_stats,
    make_rollouts,
    packed,
    sample_round,
    split,
)
from lpo_jax.training.session import Session, check_config, open_session
from lpo_jax.training.sft import check_solutions, warm_start
from lpo_jax.training.step import signal, token_metrics, update


def train(config: Config, *, resume: bool = False) -> None:
    """Runs `lpo train`: warm start where the cold model fails, RL, evaluations, checkpoints, report.

    Raises:
      UserError: something in the config, data or model cannot work (before work begins).
      RunStopped: too many non-finite gradients in a row, a verifier that failed on every response (the position before
        that step is saved), or a checkpoint that could not be saved.
      Interrupted: SIGTERM or Ctrl-C; the position is saved.
    """
    objective = check_config(config)
    behaviour = choose(config, objective)
    config = behaviour.resolve(config)  # so that a resume compares what was chosen
    run = RunDirectory(config, "train", resume)
    with open_session(config) as session, open_hooks(objective, session) as hooks:
        if config.warm_start.steps:
            check_solutions(session)
        learner = Learner.of(session, objective, hooks, config.training.steps)
        with run, Signals() as signals, Recorder(session, run, signals, config.training.steps) as recorder:
            run.note(behaviour=dataclasses.asdict(behaviour))
            introduce(session, learner.runner, behaviour, recorder.progress)
            abstract = session.abstract_state(learner.optimizer, objective)
            position = recorder.restore(abstract) or begin(session, learner, recorder)
            if position.schedule_steps:
                check_extension(config, position.schedule_steps)
                learner = Learner.of(session, objective, hooks, position.schedule_steps)
            position.schedule_steps = learner.schedule_steps
            if position.hooks is not None:
                learner.restore(position.hooks)
            data = session.prompts(config.training.prompts_per_step, position.data)
            recorder.drive(position, lambda at: take_step(session, learner, at, data, recorder))
            recorder.finish(position)


def check_extension(config: Config, schedule_steps: int) -> None:
    """Refuses steps beyond the end of a schedule that ends at 0, where nothing more would be learned.

    The schedule and `progress` stay stretched over the steps that the run was started with: stretched anew, they would
    jump back, and the rate up.
    """
    optimizer, steps = config.optimizer, config.training.steps
    if steps > schedule_steps and optimizer.schedule != "constant" and not optimizer.final_fraction:
        raise UserError(
            f"cannot resume with training.steps = {steps}: optimizer.schedule = {optimizer.schedule} reaches a rate of "
            f"0 after the {schedule_steps} steps that the run was started with; start a new run with "
            f"training.steps={steps}, or from this one's weights (lpo export)"
        )


def begin(session: Session, learner: Learner, recorder: Recorder) -> Position:
    """Step 0 of a fresh run: the model as it comes, or warm-started where it fails cold."""
    warm = session.config.warm_start
    position = Position(session.load_state())
    if warm.steps:
        cold = recorder.evaluate(position, "cold model").score
        if cold > warm.only_below:
            recorder.progress.log(f"the cold model passes {cold:.1%} of held-out samples: no warm start")
        else:
            recorder.progress.log(
                f"the cold model passes {cold:.1%} of held-out samples: RL would have nothing to learn from, so it "
                f"is warm-started with {warm.steps} supervised steps on the task's own solutions"
            )
            position.state = warm_start(session, position.state, run=recorder.run, progress=recorder.progress)
            position.evaluated = False
    position.state = session.start(position.state, learner.optimizer, learner.objective)
    if warm.steps and not position.evaluated:
        with recorder.signals.deferred():
            recorder.save(position)
    return position


def take_step(
    session: Session, learner: Learner, position: Position, data: tasks.PromptIterator, recorder: Recorder
) -> None:
    """One sampling round and its updates; moves `position` one step on."""
    config, step = session.config, position.step + 1
    sampling, training = config.sampling, config.training
    started = time.perf_counter()

    recorder.progress.phase("sampling")
    round, tools = sample_round(session, learner, position.state.policy, data, step)
    recorder.check_verdicts(round.batch.failures, f"step {step}")
    recorder.progress.phase("learning")
    hosts.phase("learning")
    rollouts = make_rollouts(round, sampling.max_tokens, learner.progress(step))
    scoring = time.perf_counter()
    rollouts, sampler_gap = complete(learner, rollouts, round, tools)
    del tools  # and with them the sampler's weights: the updates need the room
    learning = time.perf_counter()

    with recorder.signals.deferred():  # parameters, position and files move on together
        state, metrics, views = position.state, [], []
        minibatches = split(rollouts, training.updates_per_step)
        again = [extra for hook in learner.hooks if (extra := hook.replay(rollouts)) is not None]
        for index, minibatch in enumerate([*minibatches, *again]):
            minibatch = packed(learner, minibatch)
            scored = minibatch.scored.replace(control=state.control)
            used = current_stats(learner, state, minibatch, first=index == 0)
            learned = signal(learner.objective, used, scored)
            state, stats, norm = update(
                learner.runner, learner.optimizer, state, minibatch.groups, learned.cotangent
            )
            state = state.replace(control=learned.control)
            of_update = learned.metrics | token_metrics(used, stats, scored.mask) | {"actor/grad_norm": norm}
            metrics.append(of_update)
            views.append(learned.view)
        metrics = jax.device_get(metrics)  # the updates were queued without waiting for one another
        position.advance(state, data.state(), learner.state())

        batch, seconds = round.batch, time.perf_counter() - started
        in_a_row, skipped = skipped_updates(state.opt_state)
        row = measure.over_updates(metrics) | sampler_gap | learner.metrics()
        row |= measure.sampling_metrics(batch, sampling.max_tokens, sampling.max_prompt_tokens)
        row |= measure.machine_metrics(seconds, row["perf/total_num_tokens"])
        row |= {
            "actor/lr": learner.optimizer.rate_used(state.opt_state),
            "lpo/skipped_updates": skipped - position.skipped,
            "training/global_step": step,
            "training/epoch": int(data.epoch),
            "timing_s/gen": batch.seconds_sampling,
            "timing_s/reward": batch.seconds_verifying,
            "timing_s/old_log_prob": learning - scoring,
            "timing_s/update_actor": started + seconds - learning,
            "timing_s/step": seconds,
        }
        position.skipped = skipped
        recorder.write_step(step, row, batch, views[: training.updates_per_step])
    if in_a_row >= training.max_skipped_updates:
        raise Diverged(
            f"step {step}: the last {in_a_row} gradients were not finite (training.max_skipped_updates); none of them "
            "was applied; see lpo/score_abs_max and lpo/logp_gap_max in metrics.jsonl, and lower the learning rate"
        )
