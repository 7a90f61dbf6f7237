"""Drives a run: steps, with the held-out evaluations and the checkpoints between them."""

import dataclasses
from collections.abc import Callable

from lpo_jax.errors import VerifierFailed
from lpo_jax.evaluation.heldout import Evaluation
from lpo_jax.objectives import Objective
from lpo_jax.parallel import hosts
from lpo_jax.runs.directory import VERIFIER_FAILED
from lpo_jax.runs.recorder import Recorder
from lpo_jax.runs.signals import Interrupted
from lpo_jax.runs.state import Position
from lpo_jax.tasks.images import row_images
from lpo_jax.training import measure
from lpo_jax.training.optimizer import Optimizer
from lpo_jax.training.session import Session


def drive(
    session: Session, recorder: Recorder, position: Position, run_step: Callable[[Position], None]
) -> None:
    """Run steps until the last one, evaluate and save as the config says, and print the end of the run.

    Args:
      run_step: moves the position one step on.

    Raises:
      Interrupted, VerifierFailed: after the position has been saved.
    """
    with hosts.together():
        try:
            while True:
                evaluate_and_save(session, recorder, position)
                if position.step >= recorder.total:
                    break
                recorder.signals.agree()
                recorder.checkpoints.check()
                run_step(position)
        except (Interrupted, VerifierFailed) as reason:
            hosts.phase("stopping: saving the position")
            if isinstance(reason, VerifierFailed):
                recorder.run.note(**{VERIFIER_FAILED: True})
            recorder.save(position)
            recorder.checkpoints.wait()
            raise
    task = session.environment.task
    row = session.environment.heldout_rows[0]
    prompt = task.prompt(row)
    example = None if row_images(row) else prompt if isinstance(prompt, str) else prompt[-1]["content"]
    recorder.finish(position, task.name, example)


def restore(
    session: Session, recorder: Recorder, optimizer: Optimizer, objective: Objective | None = None
) -> Position | None:
    """The position of the newest checkpoint, with the frozen base of adapters; None in a fresh run."""
    hosts.phase("restoring")
    position = recorder.restore(session.model.abstract_state(optimizer, objective))
    if position is not None:
        position.state = position.state.replace(
            frozen=session.model.load_frozen(), opt_state=optimizer.at_rest(position.state.opt_state)
        )
    return position


def note_facts(session: Session, recorder: Recorder) -> None:
    """Note in run.json what is known once the session is open: data, microbatch and sandbox."""
    environment = session.environment
    task = environment.task
    hashes = {"content_hash": task.content_hash, "prompts_hash": environment.prompts_hash}
    recorder.run.note(data={**hashes, **task.about})
    recorder.run.note(microbatch=dataclasses.asdict(session.model.microbatch))
    if sandbox := environment.collect.pool.sandbox:
        recorder.run.note(sandbox=sandbox)


def evaluate_and_save(session: Session, recorder: Recorder, position: Position) -> None:
    """Evaluate and save the position if they are due at its step."""
    config, step, last = recorder.config, position.step, position.step >= recorder.total
    if not position.evaluated and (step == 0 or last or _due(step, config.evaluation.every)):
        record_evaluation(
            session, recorder, position, "before" if step == 0 else f"after {step} steps" if last else None
        )
    better = position.best_step == step
    if step > 0 and (better or last or _due(step, config.checkpoint.every)):
        hosts.phase("saving")
        with recorder.signals.deferred(), measure.stopwatch() as seconds:
            if recorder.save(position):
                recorder.writer.write(step, {"timing_s/save_checkpoint": seconds()})


def record_evaluation(
    session: Session, recorder: Recorder, position: Position, label: str | None = None
) -> Evaluation:
    """Evaluate the current parameters on the held-out problems and record the result.

    Args:
      label: shows the evaluation at the end of the run, under this name.
    """
    recorder.progress.during("evaluating")
    with measure.stopwatch() as seconds:
        evaluation = session.evaluate(position.state.policy)
    recorder.check_verdicts(evaluation.failures, f"held-out evaluation after {position.step} steps")
    row = measure.evaluation_metrics(session.environment.task.name, evaluation)
    recorder.write_evaluation(position, evaluation, row | {"timing_s/testing": seconds()}, label)
    return evaluation


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
