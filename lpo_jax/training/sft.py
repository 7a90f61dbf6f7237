"""Supervised learning on the task's own solutions: the warm start of a model that never succeeds cold.

The same update as in RL, whose coefficients need no objective: every example is a group of one response, and the
coefficient of each of its tokens is -1 / (tokens of the batch).

Rows are taken from the end of RL's shuffled order backward (`tasks.PromptIterator`), so that RL does not begin with the
prompts whose solutions the model has just been shown.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lpo_jax import reporting
from lpo_jax.config import Config
from lpo_jax.errors import UserError
from lpo_jax.models.runner import Groups
from lpo_jax.objectives import TokenStats
from lpo_jax.rollout.encode import encode_prompt, encode_solution
from lpo_jax.runs.directory import RunDirectory, Signals
from lpo_jax.sampling.padding import bucket, pad_prompts
from lpo_jax.training.optimizer import Optimizer, make_optimizer, warm_start_config
from lpo_jax.training.position import Position, Recorder, open_writer
from lpo_jax.training.session import Session, open_session
from lpo_jax.training.step import TrainState, update


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts and solutions, `[P, 1, T]`; mask marks the solutions' tokens, the end token included."""

    groups: Groups
    mask: np.ndarray


def sft(config: Config, *, resume: bool = False) -> None:
    """Runs `lpo sft`: the config's `warm_start` section as a run of its own.

    Raises:
      UserError: no steps configured, or a task without solutions.
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
        with run, Signals() as signals, Recorder(session, run, signals, warm.steps) as recorder:
            position = recorder.restore(session.abstract_state(optimizer)) or Position(
                session.start(session.load_state(), optimizer)
            )
            data = session.prompts(warm.batch_size, position.data, backward=True)

            def take_step(at: Position) -> None:
                batch = supervised_batch(session, [row for _, row in next(data)])
                with signals.deferred():
                    state, row = supervised_step(session, optimizer, at.state, batch)
                    at.advance(state, data.state())
                    recorder.writer.write(at.step, row)
                    recorder.progress.update(at.step, row)

            recorder.drive(position, take_step)
            recorder.finish(position)


def warm_start(
    session: Session, state: TrainState, run: RunDirectory, progress: reporting.Progress
) -> TrainState:
    """The supervised steps before RL; their metrics go to `warm_start/` in the run directory."""
    warm = session.config.warm_start
    optimizer = make_optimizer(warm_start_config(session.config), warm.steps)
    state = session.start(state, optimizer)
    data = session.prompts(warm.batch_size, None, backward=True)
    with open_writer(run.path / "warm_start") as writer:
        writer.truncate_after(-1)
        for step in range(1, warm.steps + 1):
            progress.phase(f"warm start {step}/{warm.steps}")
            batch = supervised_batch(session, [row for _, row in next(data)])
            state, row = supervised_step(session, optimizer, state, batch)
            writer.write(step, row)
        progress.log(f"warm start done: {warm.steps} updates, last loss {row['train/loss']:.3f} nats/token")
    return state


def supervised_step(
    session: Session, optimizer: Optimizer, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, float]]:
    """One update on the mean over the batch's tokens of -log prob, in nats, and its metrics."""
    tokens = int(batch.mask.sum())
    cotangent = TokenStats(np.where(batch.mask, np.float32(-1 / tokens), 0))
    runner = session.runner(temperature=1.0)
    groups = runner.pack(batch.groups, batch.mask)
    state, stats, norm = update(runner, optimizer, state, groups, cotangent)
    return state, {
        "train/loss": -float(jnp.where(batch.mask, stats.logp, 0.0).sum()) / tokens,
        "train/grad_norm": float(norm),
        "train/lr": session.config.warm_start.learning_rate,
        "train/global_tokens": tokens,
    }


def supervised_batch(session: Session, rows: Sequence[Any]) -> Batch:
    """Prompts and solutions `[P, 1, T]` of some rows, the end token included."""
    tokenizer, sampling = session.tokenizer, session.config.sampling
    prompts, lengths = pad_prompts(
        [encode_prompt(session.task, tokenizer, row) for row in rows], sampling.max_prompt_tokens
    )
    solutions = [encode_solution(session.task, tokenizer, row) for row in rows]
    shape = (len(rows), 1, bucket(max(map(len, solutions)), sampling.max_tokens))
    responses, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for p, ids in enumerate(solutions):
        responses[p, 0, : len(ids)], mask[p, 0, : len(ids)] = ids, True
    return Batch(Groups(prompts, lengths, responses), mask)


def check_solutions(session: Session) -> None:
    """Refuses a task without solutions, and solutions longer than a response may be."""
    limit = session.config.sampling.max_tokens
    if session.config.warm_start.batch_size > len(session.train_rows):
        raise UserError(
            f"warm_start.batch_size = {session.config.warm_start.batch_size} is more than the "
            f"{len(session.train_rows)} training rows"
        )
    for index, row in enumerate(session.train_rows):
        if session.task.solution(row) is None:
            raise UserError(
                f"warm_start: training row {index} of task {session.task.name!r} has no solution to learn"
            )
        length = len(encode_solution(session.task, session.tokenizer, row))
        if length > limit:
            raise UserError(
                f"warm_start: the solution of training row {index} has {length} tokens, "
                f"more than sampling.max_tokens = {limit}"
            )
