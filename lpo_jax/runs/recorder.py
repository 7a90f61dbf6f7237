"""The recorder of a run: metrics, responses, checkpoints, and the progress on the console."""

import contextlib
import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lpo_jax import reporting
from lpo_jax.errors import UserError
from lpo_jax.evaluation.heldout import Evaluation, powers_of_two
from lpo_jax.evaluation.metrics import mean_score, paired_difference, score_difference, summarise
from lpo_jax.inspection.page import TimedReport
from lpo_jax.json_lines import read_rows
from lpo_jax.parallel import hosts
from lpo_jax.reporting import doctor
from lpo_jax.reporting.trackers import Trackers
from lpo_jax.reporting.writers import METRICS_FILE, sample_files
from lpo_jax.rollout.collect import Rollouts
from lpo_jax.rollout.failures import QUIET, Failures, Watch
from lpo_jax.rollout.records import TokenTexts, evaluation_records, response_records, token_records
from lpo_jax.runs import compiles
from lpo_jax.runs.checkpoint import Checkpoints
from lpo_jax.runs.directory import RunDirectory
from lpo_jax.runs.learned import Learned
from lpo_jax.runs.signals import Signals
from lpo_jax.runs.state import WARM_STARTED, Position
from lpo_jax.tasks.images import EncodedImage
from lpo_jax.types import Json, PyTree, Tokenizer


class Recorder:
    """Writes what a run leaves behind, and restores it.

    Args:
      run: the directory of the run, entered.
      total_steps: of the run.
      tokenizer: the model's, for the texts of single tokens.
    """

    def __init__(self, run: RunDirectory, signals: Signals, total_steps: int, tokenizer: Tokenizer):
        self.run, self.signals, self.total = run, signals, total_steps
        self.config = run.config
        self.console = reporting.console()
        self._watch, self._saved = Watch(), False
        self._doctor, self._told = doctor.Doctor(), dict[str, int]()
        self._token_texts = TokenTexts(tokenizer)
        self._report = TimedReport()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.checkpoints = stack.enter_context(
                Checkpoints(self.run.checkpoints, self.config.checkpoint.keep)
            )
            options = {}
            if hosts.is_first():
                projects = dataclasses.asdict(self.config.tracking)
                trackers = Trackers(self.run.path, projects, self.config.to_dict())
                options["send"] = stack.enter_context(trackers).send
            self.writer = stack.enter_context(open_writer(self.run.path, **options))
            start = self.checkpoints.latest() or 0
            progress = reporting.ProgressDisplay(self.total, start=start, console=self.console)
            self.progress = stack.enter_context(
                progress if hosts.is_first() else hosts.Silent(type(progress))
            )
            if hosts.is_first():
                stack.enter_context(hosts.watch_phases(self.progress.phase))
                stack.enter_context(compiles.watch(self.progress.compiling))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        return self._stack.__exit__(*exception)

    def restore(self, abstract_state: PyTree) -> Position | None:
        """Restore the newest checkpoint and truncate the files to its step.

        Args:
          abstract_state: shapes and shardings of the train state; its frozen base is not in the checkpoint.

        Returns:
          The position; None in a fresh run.
        """
        step = self.checkpoints.latest()
        if step is None:
            hosts.on_first(self.run.require_no_checkpoint)
            self.writer.truncate_after(-1)
            return None
        self._note_saved(step)
        record = self.checkpoints.record(step)
        self.writer.truncate_after(step, evaluations=record["evaluations"])
        self.progress.log(f"resumed from the checkpoint of step {step}")
        if hosts.is_first():
            self._doctor = doctor.Doctor(rows_of(self.run.path))
        if lost := hosts.on_first(lambda: missing_steps(self.run.path, step)):
            self.progress.log(
                f"warning: {self.run.path}/metrics.jsonl has no rows of {lost}, which the checkpoint of step {step} "
                "includes; they cannot be made again, and the run goes on without them"
            )
        state = self.checkpoints.restore(step, abstract_state.replace(frozen=None))
        return Position.of_record(state, record)

    def save(self, position: Position) -> bool:
        """Save the position, unless its step is saved already, and its score. Returns whether anything was saved."""
        changing = position.state.replace(frozen=None)  # the base of adapters is read from the model's files
        fresh = self.checkpoints.save(position.step, changing, position.record(), position.score)
        if not self._saved:  # later saves run in the background; the first one is noted once it is complete
            self.checkpoints.wait()
            self._note_saved(position.step)
        return fresh

    def _note_saved(self, step: int) -> None:
        self._saved = True
        self.run.note_saved(step)

    def check_verdicts(self, found: Failures, where: str) -> None:
        """Log a warning if many responses could not be judged. Raises `VerifierFailed` if none could."""
        if warning := self._watch.check(found, where):
            self.progress.log(warning)

    def write_evaluation(
        self, position: Position, evaluation: Evaluation, row: dict[str, float], label: str | None
    ) -> None:
        """Write the metrics and the responses of a held-out evaluation, and note it in the position.

        Args:
          label: shows the evaluation at the end of the run, under this name.
        """
        phase = position.phase
        records = evaluation_records(evaluation.batches, self._token_texts, phase, position.step)
        with self.signals.deferred():  # the position counts as evaluated as soon as the row is written
            again = phase == WARM_STARTED
            self.writer.write_images(image for batch in evaluation.batches for image in all_images(batch))
            self.writer.write_samples(position.step, records, folder="validation", again=again)
            self.writer.write(position.step, row)
            position.add_evaluation(evaluation, label)
        self.progress.update(position.step, row)
        self._examine(position.step, row)
        if self.config.training.save_plots and hosts.is_first() and self._report.due():
            self._write_report()

    def write_step(self, step: int, row: dict[str, float], rollouts: Rollouts, learned: Learned) -> None:
        """Write the metrics of a step, and its responses with what the updates computed about them."""
        training = self.config.training
        if training.save_rollouts:
            of_tokens = token_records(rollouts, self._token_texts, learned.of_tokens())
            behind = (
                rollouts.responses.versions[..., 0] - 1
            )  # of the first token, which has the oldest weights
            parts = response_records(rollouts, "train", behind), learned.records(), of_tokens
            self.writer.write_images(all_images(rollouts))
            self.writer.write_samples(step, [a | b | c for a, b, c in zip(*parts)])
        if training.show_every and step % training.show_every == 0:
            self.progress.log(reporting.group_panel(response_records(rollouts, "train", step - 1), step))
        self.writer.write(step, row)
        self.progress.update(step, row)
        self._examine(step, row)

    def _examine(self, step: int, row: dict[str, float]) -> None:
        """Log what is wrong with the run at a step, each diagnosis once in a while."""
        for found in self._doctor.observe({**row, "step": step}):
            # `check_verdicts` has reported masked responses with their reason.
            known = found.name == doctor.name_of(doctor.masked_responses)
            if not known and step - self._told.get(found.name, -QUIET) >= QUIET:
                self._told[found.name] = step
                self.progress.log(found.line())

    def finish(self, position: Position, task: str, example_prompt: str | None) -> None:
        """Print the end of a run: evaluations before and after, sample responses, plots, and the next commands.

        Args:
          task: its name.
          example_prompt: for the suggested `lpo sample`; None suggests none, as `lpo sample` takes no images.
        """
        self.checkpoints.wait()
        if not hosts.is_first():
            return
        self.progress.log(self._evaluations_table(position, task))
        run = self.run.path
        try:
            self.progress.log(reporting.sample_panel(self._last_samples()))
        except UserError as error:  # the run is complete even if that file is gone
            self.progress.log(f"samples      none to show: {error}")
        rows = rows_of(run)
        if self.config.training.save_plots and rows:
            self.progress.log(f"curves       {', '.join(map(str, reporting.save_plots(run)))}")
            if (path := self._write_report()) is not None:
                self.progress.log(f"report       {path}")
        self.progress.log(f"doctor       {diagnoses_line(doctor.diagnose(rows))}")
        self.progress.log(
            f"metrics      {run}/metrics.jsonl, {run}/tensorboard",
            f"responses    {run}/rollouts, {run}/validation",
            f"checkpoints  latest step {self.checkpoints.latest()}, best step {self.checkpoints.best()}",
            "next",
            *([] if example_prompt is None else [f"  lpo sample {run} {shlex.quote(example_prompt)}"]),
            f"  lpo eval {run}",
            f"  lpo export {run} {run}/hf",
        )

    def _write_report(self) -> Path | None:
        """Write the report of the run; the run goes on without one if its directory cannot be read or written."""
        try:
            return self._report.write(self.run.path)
        except UserError as error:
            self.progress.log(f"warning: no report: {error}")
            return None

    def _evaluations_table(self, position: Position, task: str):
        """Each evaluation compared with the one above it, problem by problem."""
        rows: list[tuple[str, dict, dict | None]] = []
        above: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        for label, outcomes in position.milestones.items():
            passed, valid = np.array(outcomes["passed"], bool), np.array(outcomes["valid"], bool)
            scores = np.array(outcomes.get("scores", outcomes["passed"]), float)
            ks = self.config.evaluation.ks or powers_of_two(passed.shape[1])
            summary = summarise(passed, valid, ks=ks, seed=self.config.seed)
            name = outcomes.get("score_name", "pass")
            summary["score"] = {"name": name, **mean_score(scores, valid, self.config.seed)}
            change = None
            if above:
                change = paired_difference(above[0], passed, above[1], valid, ks=ks)
                change["score"] = score_difference(above[2], scores, above[1], valid)
            rows.append((label, summary, change))
            above = passed, valid, scores
        return reporting.before_after_table(rows, f"Held-out {task}")

    def _last_samples(self) -> list[dict]:
        """One response to each of the first held-out problems, from the last evaluation's file."""
        files = sample_files(self.run.path, "validation")
        if not files:
            raise UserError(f"{self.run.path / 'validation'} holds no evaluation")
        shown = {"prompt": "input", "response": "output", "reward": "score", "outcome": "outcome"}
        rows = read_rows(files[-1].path, needs=(*shown.values(), "k"))
        return [{ours: row[name] for ours, name in shown.items()} for row in rows if row["k"] == 0]


def all_images(rollouts: Rollouts) -> list[EncodedImage]:
    """The images of all prompts."""
    return [image for images in rollouts.images for image in images]


def open_writer(directory: Path, **options: Json) -> reporting.RunWriter | hosts.Silent:
    """The writer of a directory's metrics and samples; of many hosts, only the first writes."""
    return (
        reporting.RunWriter(directory, **options) if hosts.is_first() else hosts.Silent(reporting.RunWriter)
    )


def diagnoses_line(diagnoses: Sequence[doctor.Diagnosis]) -> str:
    """The diagnoses of a run in one line, with the number of steps and the last one of each."""
    found = (f"{d.name} at {len(d.steps)} steps, last {d.steps[-1]}" for d in diagnoses)
    return "; ".join(found) or "nothing found"


def rows_of(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; none if it was stopped before the first one, or the file was deleted."""
    return reporting.read_metrics(run) if (run / METRICS_FILE).is_file() else []


def missing_steps(run: Path, last: int) -> str:
    """The steps from 1 to `last` without a row in a run's metrics.jsonl, as text; empty if there are none."""
    there = {
        row["step"] for row in rows_of(run) if any(name.startswith(("actor/", "train/")) for name in row)
    }
    missing = [step for step in range(1, last + 1) if step not in there]
    # Consecutive steps have the same difference between step and index.
    groups = itertools.groupby(enumerate(missing), lambda pair: pair[1] - pair[0])
    spans = [[step for _, step in group] for _, group in groups]
    spelled = [f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans]
    more = [f"and {len(spelled) - 5} more ranges"] if len(spelled) > 5 else []
    return f"step{'s' * (len(missing) > 1)} {', '.join([*spelled[:5], *more])}" if missing else ""
