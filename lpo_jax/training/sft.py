"""Supervised learning on the task's own solutions: the warm start of a model that never succeeds cold.

The update is that of RL with coefficients that need no objective: every example is a group of one response, and the
coefficient of each of its tokens is -1 / (tokens of the batch).

Rows are taken from the end of RL's shuffled order backward (`tasks.PromptIterator`), so that RL does not begin with the
prompts whose solutions the model has just seen.

Axes: P prompts · T response tokens.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lpo_jax import reporting, tasks
from lpo_jax.config import Config
from lpo_jax.errors import UserError
from lpo_jax.models.runner import Groups, picture_array
from lpo_jax.objectives import TokenStats
from lpo_jax.rollout.encode import encode_images, encode_prompt, encode_solution
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.runs.recorder import Recorder, open_writer
from lpo_jax.runs.signals import Signals
from lpo_jax.runs.state import Position, TrainState
from lpo_jax.sampling.padding import bucket, pad_prompts
from lpo_jax.training.drive import drive, note_facts, restore
from lpo_jax.training.optimizer import Optimizer, make_optimizer, warm_start_config
from lpo_jax.training.session import Session, open_session
from lpo_jax.training.step import update


def sft(config: Config, *, resume: bool = False) -> None:
    """Run `lpo sft`: the config's `warm_start` section as a run of its own.

    Raises:
      UserError: no steps are configured, or the task has no solutions.
      RunStopped, Interrupted: as `lpo_jax.training.loop.train`.
    """
    warm = config.warm_start
    if warm.steps == 0:
        raise UserError(
            "warm_start.steps is 0: nothing to do; set it in the config or with --warm_start.steps=..."
        )
    run = RunDirectory(config, "sft", resume)
    with open_session(config) as session:
        check_solutions(session)
        optimizer = make_optimizer(warm_start_config(session.config), warm.steps)
        tokenizer = session.environment.tokenizer
        with run, Signals() as signals, Recorder(run, signals, warm.steps, tokenizer) as recorder:
            note_facts(session, recorder)
            position = restore(session, recorder, optimizer) or Position(
                session.model.start(session.model.load_state(), optimizer)
            )
            data = session.environment.prompts(warm.batch_size, position.data, backward=True)

            def run_step(at: Position) -> None:
                groups, mask = supervised_batch(session, [row for _, row in next(data)])
                with signals.deferred():
                    state, row = supervised_step(session, optimizer, at.state, groups, mask)
                    at.advance(state, data.state())
                    recorder.writer.write(at.step, row)
                    recorder.progress.update(at.step, row)

            drive(session, recorder, position, run_step)


def warm_start(
    session: Session, state: TrainState, run: RunDirectory, progress: reporting.ProgressDisplay
) -> TrainState:
    """The supervised steps before RL; their metrics go to `warm_start/` in the run directory."""
    warm = session.config.warm_start
    optimizer = make_optimizer(warm_start_config(session.config), warm.steps)
    state = session.model.start(state, optimizer)
    data = session.environment.prompts(warm.batch_size, None, backward=True)
    with open_writer(run.path / "warm_start") as writer:
        writer.truncate_after(-1)
        for step in range(1, warm.steps + 1):
            progress.phase(f"warm start {step}/{warm.steps}")
            groups, mask = supervised_batch(session, [row for _, row in next(data)])
            state, row = supervised_step(session, optimizer, state, groups, mask)
            writer.write(step, row)
        progress.log(f"warm start done: {warm.steps} updates, last loss {row['train/loss']:.3f} nats/token")
    return state


def supervised_step(
    session: Session, optimizer: Optimizer, state: TrainState, groups: Groups, mask: np.ndarray
) -> tuple[TrainState, dict[str, float]]:
    """One update on the mean of -log prob over the tokens of the batch, in nats.

    Args:
      mask: `[P, 1, T]` marks the tokens of the solutions, the end token included.

    Returns:
      The new state, and the metrics of the update.
    """
    tokens = int(mask.sum())
    cotangent = TokenStats(np.where(mask, np.float32(-1 / tokens), 0))
    runner = session.model.runner(temperature=1.0)
    state = state.replace(opt_state=optimizer.at_work(state.opt_state))
    state, stats, norm = update(runner, optimizer, state, runner.pack(groups, mask), cotangent)
    state = state.replace(opt_state=optimizer.at_rest(state.opt_state))
    return state, {
        "train/loss": -float(jnp.where(mask, stats.logp, 0.0).sum()) / tokens,
        "train/grad_norm": float(norm),
        "train/lr": session.config.warm_start.learning_rate,
        "train/global_tokens": tokens,
    }


def supervised_batch(session: Session, rows: Sequence[tasks.Row]) -> tuple[Groups, np.ndarray]:
    """Prompts and solutions of some rows as groups of one response, and the mask of the solutions' tokens."""
    environment, sampling = session.environment, session.config.sampling
    task, tokenizer = environment.task, environment.tokenizer
    prompts, lengths = pad_prompts(
        [encode_prompt(task, tokenizer, row) for row in rows], sampling.max_prompt_tokens
    )
    solutions = [encode_solution(task, tokenizer, row) for row in rows]
    shape = (len(rows), 1, bucket(max(map(len, solutions)), sampling.max_tokens))
    responses, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for p, ids in enumerate(solutions):
        responses[p, 0, : len(ids)], mask[p, 0, : len(ids)] = ids, True
    pictures = picture_array([encode_images(tokenizer, row) for row in rows])
    return Groups(prompts, lengths, responses, pictures=pictures), mask


def check_solutions(session: Session) -> None:
    """Refuse a task without solutions, and solutions longer than `sampling.max_tokens`."""
    environment, limit = session.environment, session.config.sampling.max_tokens
    if session.config.warm_start.batch_size > len(environment.train_rows):
        raise UserError(
            f"warm_start.batch_size = {session.config.warm_start.batch_size} is more than the "
            f"{len(environment.train_rows)} training rows"
        )
    for index, row in enumerate(environment.train_rows):
        if environment.task.solution(row) is None:
            raise UserError(
                f"warm_start: training row {index} of task {environment.task.name!r} has no solution to learn"
            )
        length = len(encode_solution(environment.task, environment.tokenizer, row))
        if length > limit:
            raise UserError(
                f"warm_start: the solution of training row {index} has {length} tokens, "
                f"more than sampling.max_tokens = {limit}"
            )
