"""Supervised learning on the task's own solutions: the warm start of a model that never succeeds cold.

The same update as in RL with another objective: every example is a group of one response, and the coefficient
of each of its tokens is -1 / (tokens of the batch).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax import reporting
from lpo_jax.config import Config
from lpo_jax.errors import UserError
from lpo_jax.evaluation.encode import encode_prompt, encode_solution
from lpo_jax.models.decoder import Params
from lpo_jax.objectives import Scored, TokenStats
from lpo_jax.sampling.padding import bucket, pad_prompts
from lpo_jax.training.batch import Groups, Rollouts
from lpo_jax.training.optimizer import make_optimizer, warm_start_config
from lpo_jax.training.position import Position, Recorder
from lpo_jax.training.run import RunDirectory, Signals
from lpo_jax.training.session import Session, open_session
from lpo_jax.training.step import TrainState, Update, update


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
        setup = supervised_update(session)
        with run, Signals() as signals, Recorder(session, run, signals, warm.steps) as recorder:
            position = recorder.restore(session.abstract_state(setup.optimizer)) or Position(
                session.with_optimizer(session.load_params(), setup.optimizer)
            )
            data = session.prompts(warm.batch_size, position.data)

            def take_step(at: Position) -> None:
                batch = supervised_batch(session, [row for _, row in next(data)])
                with signals.deferred():
                    state, row = supervised_step(setup, at.state, batch, warm.learning_rate)
                    at.advance(state, data.state())
                    recorder.writer.write(at.step, row)
                    recorder.progress.update(at.step, row)

            recorder.drive(position, take_step)
            recorder.finish(position)


def warm_start(session: Session, params: Params, run: RunDirectory, progress: reporting.Progress) -> Params:
    """The supervised steps before RL; their metrics go to `warm_start/` in the run directory."""
    warm, setup = session.config.warm_start, supervised_update(session)
    state = session.with_optimizer(params, setup.optimizer)
    data = session.prompts(warm.batch_size, None)
    with reporting.RunWriter(run.path / "warm_start") as writer:
        writer.truncate_after(-1)
        for step in range(1, warm.steps + 1):
            progress.phase(f"warm start {step}/{warm.steps}")
            batch = supervised_batch(session, [row for _, row in next(data)])
            state, row = supervised_step(setup, state, batch, warm.learning_rate)
            writer.write(step, row)
        progress.log(f"warm start done: {warm.steps} updates, last loss {row['train/loss']:.3f} nats/token")
    return state.params


def negative_log_likelihood(stats: TokenStats, scored: Scored) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean over the batch's tokens of -log prob, in nats; an objective like any other."""
    tokens = jnp.maximum(scored.mask.sum(), 1)
    loss = -jnp.sum(jnp.where(scored.mask, stats.logp, 0.0)) / tokens
    return loss, {"train/loss": loss}


def supervised_update(session: Session) -> Update:
    """The run's update with the supervised objective and the warm start's own learning rate."""
    optimizer = make_optimizer(warm_start_config(session.config), session.config.warm_start.steps)
    return session.update(negative_log_likelihood, optimizer, temperature=1.0)


def supervised_step(
    setup: Update, state: TrainState, batch: Rollouts, learning_rate: float
) -> tuple[TrainState, dict[str, float]]:
    """One update, and its metrics under the names of a supervised run."""
    state, metrics = update(setup, state, batch, TokenStats(batch.scored.behaviour_logp))
    return state, {
        "train/loss": float(metrics["train/loss"]),
        "train/grad_norm": float(metrics["actor/grad_norm"]),
        "train/lr": learning_rate,
        "train/global_tokens": int(batch.scored.mask.sum()),
    }


def supervised_batch(session: Session, rows: Sequence[Any]) -> Rollouts:
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
    # The coefficients do not depend on log-probs, so none need be known before the update.
    unknown = np.zeros(shape, np.float32)
    scored = Scored(behaviour_logp=unknown, rewards=np.zeros(shape[:2], np.float32), mask=mask)
    return Rollouts(Groups(prompts, lengths, responses), scored)


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
