"""Where a run stands between two steps, and how that is shown, written, saved and restored."""

import contextlib
import dataclasses
import itertools
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lpo_jax import reporting
from lpo_jax.errors import UserError, VerifierFailed
from lpo_jax.evaluation.heldout import Evaluation, powers_of_two
from lpo_jax.evaluation.metrics import paired_difference, summarise
from lpo_jax.json_lines import read_rows
from lpo_jax.objectives import Listwise
from lpo_jax.parallel import hosts
from lpo_jax.reporting.writers import METRICS_FILE
from lpo_jax.rollout.collect import Collected
from lpo_jax.rollout.failures import Failures, Watch
from lpo_jax.runs.checkpoint import Checkpoints
from lpo_jax.runs.directory import VERIFIER_FAILED, Interrupted, RunDirectory, Signals
from lpo_jax.training import measure
from lpo_jax.training.session import Session
from lpo_jax.training.step import TrainState


@dataclasses.dataclass
class Position:
    """Between two steps.

    Attributes:
      data: state of the prompt iterator after `step` batches; None at the start.
      evaluated: whether the held-out evaluation of `step` is done.
      evaluations: how many were done at `step`: a warm-started run has evaluated the cold model before.
      score: held-out pass@1 of `step`, by which checkpoints are compared; None before the first step.
      best: best held-out pass@1 so far.
      best_step: the first step that reached it.
      skipped: non-finite gradients so far.
      hooks: states of the method's hooks; None where there are none yet.
      schedule_steps: steps that the learning rate's schedule runs over, those the run was started with; 0: not known.
      milestones: label -> per-problem outcomes of the evaluations shown at the end.
    """

    state: TrainState
    step: int = 0
    data: Any = None
    evaluated: bool = False
    evaluations: int = 0
    score: float | None = None
    best: float | None = None
    best_step: int | None = None
    skipped: int = 0
    hooks: list[Any] | None = None
    schedule_steps: int = 0
    milestones: dict[str, dict] = dataclasses.field(default_factory=dict)

    def advance(self, state: TrainState, data: Any, hooks: list[Any] | None = None) -> None:
        """One step on."""
        self.state, self.data, self.hooks = state, data, hooks
        self.step, self.evaluated, self.evaluations, self.score = self.step + 1, False, 0, None

    def record(self) -> dict[str, Any]:
        """All but the arrays, as JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "state"]
        return {name: getattr(self, name) for name in names}

    def add_evaluation(self, evaluation: Evaluation, label: str | None) -> None:
        """The held-out evaluation of `step` is done; with a label it is shown at the end of the run."""
        self.evaluated, self.evaluations = True, self.evaluations + 1
        if self.step > 0 and math.isfinite(evaluation.score):
            self.score = evaluation.score
            if self.best is None or self.score > self.best:
                self.best, self.best_step = self.score, self.step
        if label:
            self.milestones[label] = {
                "passed": evaluation.passed.astype(int).tolist(),
                "valid": evaluation.valid.astype(int).tolist(),
            }


class Recorder:
    """The outward side of a run: files, checkpoints, progress line."""

    def __init__(self, session: Session, run: RunDirectory, signals: Signals, total_steps: int):
        self.session, self.run, self.signals, self.total = session, run, signals, total_steps
        self.config = session.config
        self.console = reporting.console()
        self._watch, self._saved = Watch(), False

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.checkpoints = stack.enter_context(
                Checkpoints(self.run.checkpoints, self.config.checkpoint.keep)
            )
            self.writer = stack.enter_context(open_writer(self.run.path))
            start = self.checkpoints.latest() or 0
            progress = reporting.Progress(self.total, start=start, console=self.console)
            self.progress = stack.enter_context(progress if hosts.first() else hosts.Silent())
            task = self.session.task
            hashes = {"content_hash": task.content_hash, "prompts_hash": self.session.prompts_hash}
            self.run.note(data={**hashes, **task.about})
            self.run.note(microbatch=dataclasses.asdict(self.session.microbatch))
            if sandbox := self.session.collect.pool.sandbox:
                self.run.note(sandbox=sandbox)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        return self._stack.__exit__(*exception)

    def restore(self, abstract_state: Any) -> Position | None:
        """The newest checkpoint's position, with the files taken back to it; None in a fresh run."""
        step = self.checkpoints.latest()
        if step is None:
            hosts.on_first(self.run.require_no_checkpoint)
            self.writer.truncate_after(-1)
            return None
        self._note_saved(step)
        record = self.checkpoints.record(step)
        self.writer.truncate_after(step, evaluations=record["evaluations"])
        self.progress.log(f"resumed from the checkpoint of step {step}")
        if lost := hosts.on_first(lambda: missing_steps(self.run.path, step)):
            self.progress.log(
                f"warning: {self.run.path}/metrics.jsonl has no rows of {lost}, which the checkpoint of step {step} "
                "includes; they cannot be made again, and the run goes on without them"
            )
        state = self.checkpoints.restore(step, abstract_state.replace(frozen=None))
        return Position(state.replace(frozen=self.session.load_frozen()), **record)

    def drive(self, position: Position, take_step: Callable[[Position], None]) -> None:
        """Steps until the run's last one, with evaluations and checkpoints between them.

        SIGTERM and Ctrl-C save the position and come out as `Interrupted`.
        """
        with hosts.together():
            try:
                while True:
                    self._evaluate_and_save(position)
                    if position.step >= self.total:
                        break
                    self.signals.agree()
                    self.checkpoints.check()
                    take_step(position)
            except (Interrupted, VerifierFailed) as reason:
                if isinstance(reason, VerifierFailed):
                    self.run.note(**{VERIFIER_FAILED: True})
                self.save(position)
                self.checkpoints.wait()
                raise

    def save(self, position: Position) -> bool:
        """Saves the position unless its step is saved already, and its score."""
        changing = position.state.replace(frozen=None)  # the base of adapters is read from the model's files
        fresh = self.checkpoints.save(position.step, changing, position.record(), position.score)
        if (
            not self._saved
        ):  # later saves run in the background; that there is one is noted once it is certain
            self.checkpoints.wait()
            self._note_saved(position.step)
        return fresh

    def _note_saved(self, step: int) -> None:
        self._saved = True
        self.run.note_saved(step)

    def _evaluate_and_save(self, position: Position) -> None:
        step, last = position.step, position.step >= self.total
        if not position.evaluated and (step == 0 or last or _due(step, self.config.evaluation.every)):
            self.evaluate(position, "before" if step == 0 else f"after {step} steps" if last else None)
        better = position.best_step == step
        if step > 0 and (better or last or _due(step, self.config.checkpoint.every)):
            with self.signals.deferred(), measure.stopwatch() as seconds:
                if self.save(position):
                    self.writer.write(step, {"timing_s/save_checkpoint": seconds()})

    def evaluate(self, position: Position, label: str | None = None) -> Evaluation:
        """Held-out evaluation of the current parameters: a metrics row, its responses, maybe a milestone."""
        self.progress.phase("evaluating")
        with measure.stopwatch() as seconds:
            evaluation = self.session.evaluate(position.state.policy)
        self.check_verdicts(evaluation.failures, f"held-out evaluation after {position.step} steps")
        row = measure.evaluation_metrics(self.session.task.name, evaluation)
        with self.signals.deferred():  # the position is evaluated when its row is written
            self.writer.write_samples(position.step, evaluation.records, folder="validation")
            self.writer.write(position.step, row | {"timing_s/testing": seconds()})
            position.add_evaluation(evaluation, label)
        self.progress.update(position.step, row)
        return evaluation

    def check_verdicts(self, found: Failures, where: str) -> None:
        """Warns where many responses are masked. Raises `VerifierFailed` where all are."""
        if told := self._watch.check(found, where):
            self.progress.log(told)

    def write_step(self, step: int, row: dict[str, float], batch: Collected, views: list[Listwise]) -> None:
        """A step's metrics, and its responses with what the objective made of them."""
        if self.config.training.save_rollouts:
            self.writer.write_samples(step, rollout_records(batch, views))
        self.writer.write(step, row)
        self.progress.update(step, row)

    def finish(self, position: Position) -> None:
        """The end of a run: before/after table, sample responses, plots, and what to do next."""
        self.checkpoints.wait()
        if not hosts.first():
            return
        self.progress.log(self._evaluations_table(position))
        run = self.run.path
        try:
            self.progress.log(reporting.sample_panel(self._last_samples()))
        except UserError as error:  # the run is finished whatever has become of that file
            self.progress.log(f"samples      none to show: {error}")
        if self.config.training.save_plots:
            self.progress.log(f"curves       {', '.join(map(str, reporting.save_plots(run)))}")
        self.progress.log(
            f"metrics      {run}/metrics.jsonl, {run}/tensorboard",
            f"responses    {run}/rollouts, {run}/validation",
            f"checkpoints  latest step {self.checkpoints.latest()}, best step {self.checkpoints.best()}",
            "next",
            f"  lpo sample {run} {shlex.quote(self._example_prompt())}",
            f"  lpo eval {run}",
            f"  lpo export {run} {run}/hf",
        )

    def _evaluations_table(self, position: Position):
        """Each evaluation against the one above it, problem by problem."""
        rows, above = [], None
        for label, outcomes in position.milestones.items():
            passed, valid = np.array(outcomes["passed"], bool), np.array(outcomes["valid"], bool)
            ks = self.config.evaluation.ks or powers_of_two(passed.shape[1])
            change = paired_difference(above[0], passed, above[1], valid, ks=ks) if above else None
            rows.append((label, summarise(passed, valid, ks=ks, seed=self.config.seed), change))
            above = passed, valid
        return reporting.before_after_table(rows, f"Held-out {self.session.task.name}")

    def _last_samples(self) -> list[dict]:
        """One response to each of the first held-out problems, from the last evaluation's file."""
        folder = self.run.path / "validation"
        newest = max(
            (path for path in folder.glob("*.jsonl") if path.stem.isdigit()), key=_step, default=None
        )
        if newest is None:
            raise UserError(f"{folder} holds no evaluation")
        shown = {"prompt": "input", "response": "output", "reward": "score", "outcome": "outcome"}
        rows = read_rows(newest, needs=(*shown.values(), "k"))
        return [{ours: row[name] for ours, name in shown.items()} for row in rows if row["k"] == 0]

    def _example_prompt(self) -> str:
        prompt = self.session.task.prompt(self.session.heldout_rows[0])
        return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def open_writer(directory: Path) -> reporting.RunWriter | hosts.Silent:
    """The writer of a directory's metrics and samples; the first of many hosts writes for all."""
    return reporting.RunWriter(directory) if hosts.first() else hosts.Silent()


def missing_steps(run: Path, last: int) -> str:
    """The steps from 1 to `last` without a row of their update in a run's metrics.jsonl, as text; empty for none."""
    rows = reporting.read_metrics(run) if (run / METRICS_FILE).is_file() else []
    there = {row["step"] for row in rows if any(name.startswith(("actor/", "train/")) for name in row)}
    missing = [step for step in range(1, last + 1) if step not in there]
    # Consecutive steps share the difference to their place in the list.
    groups = itertools.groupby(enumerate(missing), lambda pair: pair[1] - pair[0])
    spans = [[step for _, step in group] for _, group in groups]
    spelled = [f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans]
    more = [f"and {len(spelled) - 5} more ranges"] if len(spelled) > 5 else []
    return f"step{'s' * (len(missing) > 1)} {', '.join([*spelled[:5], *more])}" if missing else ""


def _step(path: Path) -> int:
    return int(path.stem)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def rollout_records(batch: Collected, views: list[Listwise]) -> list[dict]:
    """Each response with its target w*, policy P and coefficient c (`[P, K]` over the round's minibatches)."""
    views = hosts.to_host(views)
    of = {
        name: np.concatenate([getattr(view, name) for view in views]).ravel()
        for name in ("target", "policy", "coefficients", "valid")
    }
    return [
        record
        | {
            "target": float(of["target"][i]),
            "policy": float(of["policy"][i]),
            "coefficient": float(of["coefficients"][i]),
            "valid": bool(of["valid"][i]),
        }
        for i, record in enumerate(batch.records())
    ]
