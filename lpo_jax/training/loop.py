"""Reinforcement learning: sample, verify, compute targets, update.

`run_step` is one training step from top to bottom; `train` is the run around it.

Axes: P prompts · K responses · T response tokens.
"""

import dataclasses
import time

from lpo_jax import tasks
from lpo_jax.config import Config
from lpo_jax.errors import Diverged, UserError
from lpo_jax.parallel import hosts
from lpo_jax.rollout.hooks import open_hooks
from lpo_jax.rollout.rounds import make_batch, sample_round
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.runs.learned import Learned
from lpo_jax.runs.recorder import Recorder
from lpo_jax.runs.signals import Signals
from lpo_jax.runs.state import Position
from lpo_jax.training import measure
from lpo_jax.training.behaviour import choose_behaviour
from lpo_jax.training.check import check_config
from lpo_jax.training.drive import drive, note_facts, record_evaluation, restore
from lpo_jax.training.intro import introduce
from lpo_jax.training.learner import Learner, complete_batch, take_step
from lpo_jax.training.optimizer import skipped_updates
from lpo_jax.training.session import Session, open_session
from lpo_jax.training.sft import check_solutions, warm_start


def train(config: Config, *, resume: bool = False) -> None:
    """Run `lpo train`: a warm start if the cold model fails, RL, evaluations, checkpoints, report.

    Raises:
      UserError: something in the config, the data or the model cannot work; before work begins.
      RunStopped: too many non-finite gradients in a row, a verifier that failed on every response (the position before
        that step is saved), or a checkpoint that could not be saved.
      Interrupted: SIGTERM or Ctrl-C; the position is saved.
    """
    objective = check_config(config)
    behaviour = choose_behaviour(config, objective)
    config = behaviour.resolve(config)  # so that a resume compares with what was chosen
    run = RunDirectory(config, "train", resume)
    with open_session(config) as session, open_hooks(objective, session.environment) as hooks:
        if config.warm_start.steps:
            check_solutions(session)
        learner = Learner.of(session.model, objective, hooks, config.training.steps)
        tokenizer = session.environment.tokenizer
        with run, Signals() as signals, Recorder(run, signals, config.training.steps, tokenizer) as recorder:
            note_facts(session, recorder)
            run.note(behaviour=dataclasses.asdict(behaviour), score=session.score_name)
            introduce(session, learner.runner, behaviour, recorder.progress)
            position = restore(session, recorder, learner.optimizer, objective)
            position = position or begin(session, learner, recorder)
            if position.schedule_steps:
                check_extension(config, position.schedule_steps)
                learner = Learner.of(session.model, objective, hooks, position.schedule_steps)
            position.schedule_steps = learner.schedule_steps
            if position.hooks is not None:
                learner.restore(position.hooks)
            data = session.environment.prompts(config.training.prompts_per_step, position.data)
            drive(session, recorder, position, lambda at: run_step(session, learner, at, data, recorder))


def check_extension(config: Config, schedule_steps: int) -> None:
    """Refuse steps beyond the end of a schedule that ends at a rate of 0, because they would learn nothing.

    The schedule and `progress` keep the number of steps that the run was started with. With a new number, progress
    would jump back and the rate would jump up.
    """
    optimizer, steps = config.optimizer, config.training.steps
    if steps > schedule_steps and optimizer.schedule != "constant" and not optimizer.final_fraction:
        raise UserError(
            f"cannot resume with training.steps = {steps}: optimizer.schedule = {optimizer.schedule} reaches a rate of "
            f"0 after the {schedule_steps} steps that the run was started with; start a new run with "
            f"training.steps={steps}, or from this one's weights (lpo export)"
        )


def begin(session: Session, learner: Learner, recorder: Recorder) -> Position:
    """Step 0 of a fresh run: the model as it is loaded, or warm-started if it fails cold."""
    warm = session.config.warm_start
    hosts.phase("loading the model")
    position = Position(session.model.load_state())
    if warm.steps:
        cold = record_evaluation(session, recorder, position, "cold model").summary["pass@1"]["mean"]
        if cold > warm.only_below:
            recorder.progress.log(f"the cold model passes {cold:.1%} of held-out samples: no warm start")
        else:
            recorder.progress.log(
                f"the cold model passes {cold:.1%} of held-out samples: RL would have nothing to learn from, so it "
                f"is warm-started with {warm.steps} supervised steps on the task's own solutions"
            )
            position.state = warm_start(session, position.state, run=recorder.run, progress=recorder.progress)
            position.evaluated = False
    position.state = session.model.start(position.state, learner.optimizer, learner.objective)
    if warm.steps and not position.evaluated:
        with recorder.signals.deferred():
            recorder.save(position)
    return position


def run_step(
    session: Session, learner: Learner, position: Position, data: tasks.PromptIterator, recorder: Recorder
) -> None:
    """Sample a round, verify it and learn from it; then move `position` one step on and write metrics and responses."""
    config, step = session.config, position.step + 1
    started = time.perf_counter()
    rollouts, tools, in_flight = sample_round(
        session.environment,
        learner.hooks,
        learner.runner,
        position.state.policy,
        data,
        step,
        position.in_flight,
    )
    recorder.check_verdicts(rollouts.failures, f"step {step}")
    hosts.phase("learning")
    batch = make_batch(rollouts, config.sampling.max_tokens, learner.progress(step))
    scoring = time.perf_counter()
    batch, sampler_gap = complete_batch(learner, batch, rollouts, tools)
    del tools  # and with them the sampler's weights: the updates need their memory
    learning = time.perf_counter()

    with recorder.signals.deferred():  # parameters, position and files change together
        state, of_updates, updates = take_step(learner, position.state, batch)
        position.advance(state, data.state(), learner.state(), in_flight)
        seconds = time.perf_counter() - started
        in_a_row, skipped = skipped_updates(state.opt_state)
        learned = Learned.on_host(updates)
        row = of_updates | sampler_gap | learner.metrics() | learned.metrics()
        row |= measure.rollout_metrics(rollouts, config.sampling)
        if config.sampling.ahead:
            row |= measure.staleness_metrics(rollouts.responses, step)
        row |= measure.machine_metrics(seconds, row["perf/total_num_tokens"])
        row |= {
            "actor/lr": learner.optimizer.rate_used(state.opt_state),
            "lpo/skipped_updates": skipped - position.skipped,
            "training/global_step": step,
            "training/epoch": int(data.epoch),
            "timing_s/old_log_prob": learning - scoring,
            "timing_s/update_actor": started + seconds - learning,
            "timing_s/step": seconds,
        }
        position.skipped = skipped
        recorder.write_step(step, row, rollouts, learned)
    if in_a_row >= config.training.max_skipped_updates:
        raise Diverged(
            f"step {step}: the last {in_a_row} gradients were not finite (training.max_skipped_updates); none of them "
            "was applied; see lpo/score_abs_max and lpo/logp_gap_max in metrics.jsonl, and lower the learning rate"
        )
