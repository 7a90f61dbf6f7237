"""What a run leaves behind step by step: `metrics.jsonl`, TensorBoard events and sampled rollouts.

The JSONL file is the record; TensorBoard is a view of it. A row is on the disk when `write` returns, so a run
that is killed has lost at most the row it was writing. On resume `truncate_after` takes the files back to
the checkpoint's step, and the resumed run appends what the uninterrupted one would have (`is_timing` names
apart).
Write a step's row before its checkpoint is saved: then no checkpoint exists whose rows are missing.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lpo_jax.errors import UserError
from lpo_jax.files import append, cannot_write, write_atomically, write_file
from lpo_jax.json_lines import dump_line, read_lines
from lpo_jax.reporting import metric_names

METRICS_FILE = "metrics.jsonl"
SAMPLE_FOLDERS = ("rollouts", "validation")


class RunWriter:
    """Appends the rows of one run directory; one process of a run holds one.

    A directory that already has rows is continued: its torn last line, if any, is removed, and rows of
    earlier steps than the last are refused until `truncate_after` has been called.
    """

    def __init__(self, run_dir: str | os.PathLike):
        self.run_dir = Path(run_dir)
        self._path = self.run_dir / METRICS_FILE
        self._file = None
        self._events = None
        self._purge_step = None
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._keep_rows(lambda row: True)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row and flushes it to the disk.

        Args:
            step: the training step; 0 is before the first update. It never goes back.
            metrics: name to number (Python, numpy or a jax scalar). A value that is not finite is written as
                null and kept as text under `"nonfinite"`, so that every line stays valid JSON.

        Raises:
            ValueError: a name that `metric_names` does not hold, a value that is no number, or a step that
                goes back.
            UserError: the file cannot be written (a full disk).
        """
        metric_names.check(metrics)
        if step < self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: call truncate_after first")
        values = {name: _number(name, value) for name, value in metrics.items()}
        nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        row = {"step": int(step)} | {n: None if n in nonfinite else v for n, v in values.items()}
        if nonfinite:
            row["nonfinite"] = nonfinite
        try:
            self._append(row)
            self._write_events(step, values)
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._last_step = int(step)

    def write_samples(self, step: int, rows: Iterable[Mapping], folder: str = "rollouts") -> Path:
        """Writes `<folder>/<step>.jsonl`, one response a line, whole or not at all.

        Args:
            step: added to each row, as verl does (its keys: input, output, gts, score, step, ...).
            rows: dicts of text, numbers, lists and arrays; numbers that are not finite become null.
            folder: "rollouts" for training responses, "validation" for held-out ones.
        """
        if folder not in SAMPLE_FOLDERS:
            raise ValueError(f"folder must be one of {SAMPLE_FOLDERS}, got {folder!r}")
        path = self.run_dir / folder / f"{step}.jsonl"
        write_file(path, b"".join(dump_line({**row, "step": int(step)}) for row in rows))
        return path

    def truncate_after(self, step: int, evaluations: int | None = None) -> None:
        """Goes back to a checkpoint: drops rows and sample files of later steps, and has TensorBoard hide its
        later events. Call it on resume, before the first write.

        Args:
            evaluations: how many held-out evaluations of its step the checkpoint knows of; rows of later ones are
                dropped, because they will be done again. All stay by default.
        """
        self.close()
        evaluated = 0

        def stays(row: Mapping) -> bool:
            nonlocal evaluated
            if row["step"] == step and any(name.startswith("val-") for name in row):
                evaluated += 1
                return evaluations is None or evaluated <= evaluations
            return row["step"] <= step

        try:
            self._keep_rows(stays)
            for folder in SAMPLE_FOLDERS:
                for path in (self.run_dir / folder).glob("*.jsonl*"):
                    name = path.name.split(".")[0]
                    first_gone = step if folder == "validation" and evaluations == 0 else step + 1
                    if path.suffix == ".tmp" or (name.isdigit() and int(name) >= first_gone):
                        path.unlink()
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._purge_step = step + 1

    def close(self) -> None:
        """Closes the files. A later `write` opens them again."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            with contextlib.suppress(OSError):  # on a full disk the first error has been told already
                self._events.close()
        self._file = self._events = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _keep_rows(self, wanted) -> None:
        # Lines are kept byte for byte. The file is replaced only where something goes, and in one move.
        before = self._path.read_bytes() if self._path.exists() else b""
        rows = [(line, row) for line, row in (_rows(self._path) if before else ()) if wanted(row)]
        after = b"".join(line.removesuffix(b"\n") + b"\n" for line, _ in rows)
        if after != before:
            write_atomically(self._path, after)
        self._last_step = rows[-1][1]["step"] if rows else -1

    def _append(self, row: Mapping) -> None:
        if self._file is None:
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - it lives as long as the run
        append(self._file, dump_line(row))

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        # tensorboardX's SummaryWriter puts events through a queue and a thread and cannot be flushed at a
        # known point, so a kill loses rows of steps that a checkpoint holds. Its EventsWriter writes at once.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        now = time.time()
        if self._events is None:
            folder = self.run_dir / "tensorboard"
            folder.mkdir(exist_ok=True)
            # File names hold whole seconds only: a quick resume must not overwrite the file before it.
            self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
            if self._purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=self._purge_step, wall_time=now, session_log=start))
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.write_event(Event(step=step, wall_time=now, summary=Summary(value=scalars)))
        self._events.flush()


def read_metrics(run_dir: str | os.PathLike) -> list[dict]:
    """The rows of a run's `metrics.jsonl`, in order; a torn last line is left out.

    Raises:
        UserError: there is no such file, or a line before the last is not a row.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run_dir} holds no {METRICS_FILE}; give the directory of a run")
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[bytes, dict]]:
    """(line, row) pairs. Only the last line may be damaged, which is what a kill in mid-write leaves."""
    return read_lines(path, _check_row, may_be_torn=True)


def _check_row(row: Mapping) -> None:
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("no step")


def _number(name: str, value) -> int | float:
    try:
        value = value.item() if hasattr(value, "item") else value
        return int(value) if isinstance(value, int) else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r} is not one number: {value!r}") from error
