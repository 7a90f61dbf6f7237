"""Reinforcement learning: sample, verify, project, learn.

`take_step` is one training step from top to bottom; `train` is the run around it.

Axes: P prompts · K responses · T response tokens.
"""

import functools
import time

import jax

from lpo_jax import tasks
from lpo_jax.config import Config
from lpo_jax.errors import RunStopped
from lpo_jax.evaluation.collect import Collected
from lpo_jax.models.decoder import Params
from lpo_jax.objectives import Listwise, Scored, TokenStats
from lpo_jax.sampling import Sampling
from lpo_jax.sampling.padding import bucket, pad_to
from lpo_jax.training import measure
from lpo_jax.training.batch import Groups, Rollouts
from lpo_jax.training.intro import introduce
from lpo_jax.training.optimizer import learning_rate, make_optimizer, skipped_updates
from lpo_jax.training.position import Position, Recorder
from lpo_jax.training.run import RunDirectory, Signals
from lpo_jax.training.session import Session, check_config, open_session
from lpo_jax.training.sft import check_solutions, warm_start
from lpo_jax.training.step import Objective, TrainState, Update, gap, score, update


def train(config: Config, *, resume: bool = False) -> None:
    """Runs `lpo train`: warm start where the cold model fails, RL, evaluations, checkpoints, report.

    Raises:
      UserError: something in the config, data or model cannot work (before work begins).
      RunStopped: too many non-finite gradients in a row, or a checkpoint that could not be saved.
      Interrupted: SIGTERM or Ctrl-C; the position is saved.
    """
    objective = check_config(config)
    run = RunDirectory(config, "train", resume)
    with open_session(config) as session:
        if config.warm_start.steps:
            check_solutions(session)
        setup = session.update(
            objective,
            make_optimizer(config.optimizer, config.training.total_updates),
            config.sampling.temperature,
        )
        with run, Signals() as signals, Recorder(session, run, signals, config.training.steps) as recorder:
            introduce(session, setup, recorder.progress)
            position = recorder.restore(session.abstract_state(setup.optimizer)) or begin(
                session, setup, recorder
            )
            data = session.prompts(config.training.prompts_per_step, position.data)
            recorder.drive(position, lambda at: take_step(session, setup, at, data, recorder))
            recorder.finish(position)


def begin(session: Session, setup: Update, recorder: Recorder) -> Position:
    """Step 0 of a fresh run: the model as it comes, or warm-started where it fails cold."""
    warm = session.config.warm_start
    position = Position(TrainState(session.load_params(), None))
    if warm.steps:
        cold = recorder.evaluate(position, "cold model").score
        if cold > warm.only_below:
            recorder.progress.log(f"the cold model passes {cold:.1%} of held-out samples: no warm start")
        else:
            recorder.progress.log(
                f"the cold model passes {cold:.1%} of held-out samples: RL would have nothing to learn from, so it "
                f"is warm-started with {warm.steps} supervised steps on the task's own solutions"
            )
            params = warm_start(session, position.state.params, run=recorder.run, progress=recorder.progress)
            position.state, position.evaluated = TrainState(params, None), False
    position.state = session.with_optimizer(position.state.params, setup.optimizer)
    if warm.steps and not position.evaluated:
        with recorder.signals.deferred():
            recorder.save(position)
    return position


def take_step(
    session: Session,
    setup: Update,
    position: Position,
    data: tasks.PromptIterator,
    recorder: Recorder,
) -> None:
    """One sampling round and its updates; moves `position` one step on."""
    config, step = session.config, position.step + 1
    sampling, training = config.sampling, config.training
    started = time.perf_counter()

    recorder.progress.phase("sampling")
    batch = session.collect(
        session.collect.sampler.prepare(position.state.params),
        next(data),
        num_responses=sampling.num_responses,
        max_tokens=sampling.max_tokens,
        sampling=Sampling(sampling.temperature),
        seed=config.seed,
        step=step,
        stop=sampling.stop,
    )
    recorder.progress.phase("learning")
    rollouts = make_rollouts(batch, sampling.max_tokens)
    scoring = time.perf_counter()
    rescored_gap = {}
    if training.behaviour == "rescored":
        rollouts, rescored_gap = rescored(setup, position.state.params, rollouts)
    learning = time.perf_counter()

    with recorder.signals.deferred():  # parameters, position and files move on together
        state, metrics, views = position.state, [], []
        for index, minibatch in enumerate(split(rollouts, training.updates_per_step)):
            used = TokenStats(minibatch.scored.behaviour_logp)
            if index > 0:  # the parameters are no longer those that sampled
                used = score(setup, state.params, minibatch.groups)
            views.append(listwise(setup.objective, used, minibatch.scored))
            state, of_update = update(setup, state, minibatch, used)
            metrics.append(jax.device_get(of_update))
        position.advance(state, data.state())

        seconds = time.perf_counter() - started
        in_a_row, skipped = skipped_updates(state.opt_state)
        row = measure.over_updates(metrics) | rescored_gap
        row |= measure.sampling_metrics(batch, sampling.max_tokens, sampling.max_prompt_tokens)
        row |= measure.machine_metrics(seconds, row["perf/total_num_tokens"])
        row |= {
            "actor/lr": learning_rate(
                config.optimizer, training.total_updates, step * training.updates_per_step - 1
            ),
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
        recorder.write_step(step, row, batch, views)
    if in_a_row >= training.max_skipped_updates:
        raise RunStopped(
            f"step {step}: the last {in_a_row} gradients were not finite (training.max_skipped_updates); none of them "
            "was applied; see lpo/score_abs_max and lpo/logp_gap_max in metrics.jsonl, and lower the learning rate"
        )


def make_rollouts(batch: Collected, max_tokens: int) -> Rollouts:
    """What was sampled, padded to a bucket of response tokens, as the arrays an update takes."""
    responses = batch.responses
    T = bucket(responses.tokens.shape[-1], max_tokens)
    scored = Scored(
        behaviour_logp=pad_to(responses.log_probs, T),
        rewards=batch.rewards,
        mask=pad_to(responses.mask, T),
        valid=batch.valid,
    )
    return Rollouts(Groups(batch.prompts, batch.prompt_lengths, pad_to(responses.tokens, T)), scored)


def rescored(setup: Update, params: Params, rollouts: Rollouts) -> tuple[Rollouts, dict[str, float]]:
    """Behaviour log-probs from the trainer's own program, and the gap to the sampler's."""
    sampled, mask = TokenStats(rollouts.scored.behaviour_logp), rollouts.scored.mask
    by_trainer = score(setup, params, rollouts.groups)
    scored = rollouts.scored.replace(behaviour_logp=by_trainer.logp)
    return rollouts.replace(scored=scored), {k: float(v) for k, v in gap(sampled, by_trainer, mask).items()}


def split(rollouts: Rollouts, parts: int) -> list[Rollouts]:
    """A round's prompts as equal minibatches of whole groups."""
    P = rollouts.groups.prompts.shape[0] // parts
    return [jax.tree.map(lambda x, i=i: x[i * P : (i + 1) * P], rollouts) for i in range(parts)]


@functools.partial(jax.jit, static_argnums=0)
def listwise(objective: Objective, used: TokenStats, scored: Scored) -> Listwise:
    """Target, policy and coefficients `[P, K]` of an update, for the rollout files."""
    return objective.listwise(used, scored)
