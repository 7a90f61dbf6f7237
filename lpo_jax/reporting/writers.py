"""Writer and reader of a run's metrics (`metrics.jsonl`, TensorBoard events) and sampled responses.

`metrics.jsonl` is authoritative; the TensorBoard events repeat it. A row is synced to the disk before `write`
returns, so a killed run loses at most the row that it was writing. On resume `truncate_after` removes what was
written after the checkpoint, and the resumed run appends the rows that the uninterrupted run would have written
(except for `is_timing` metrics). Write the row of a step before saving its checkpoint, so that every checkpoint's
rows exist.
"""

import contextlib
import io
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lpo_jax.errors import UserError
from lpo_jax.files import append, cannot_write, write_atomically, write_file
from lpo_jax.json_lines import dump_line, read_lines
from lpo_jax.reporting import metric_names
from lpo_jax.reporting.pictures import png, thumbnail
from lpo_jax.tasks.images import EncodedImage
from lpo_jax.types import Json

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

METRICS_FILE = "metrics.jsonl"
IMAGE_FOLDER = "images"  # of thumbnails
SAMPLE_FOLDERS = ("rollouts", "validation")
AGAIN = ".warm-started"  # in the name of the file of a step's second evaluation


class RunWriter:
    """Append rows to the files of one run directory. Only one process of a run creates a writer.

    If the directory already has rows, new rows are appended to them. A truncated last line is removed, and
    `write` raises on steps before the last row until `truncate_after` has been called.

    Args:
        run_dir: the run directory; created if needed.
        send: called with the index, the step and the metrics of each new row.

    Raises:
        UserError: the directory cannot be written, or a line before the last is damaged.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        send: Callable[[int, int, Mapping[str, float]], None] = lambda index, step, values: None,
    ):
        self.run_dir, self._send, self._rows = Path(run_dir), send, 0
        self._path = self.run_dir / METRICS_FILE
        self._file: io.FileIO | None = None
        self._events: EventsWriter | None = None
        self._purge_step: int | None = None
        self._last_step = -1
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._keep_rows(lambda row: True)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row and sync it to the disk.

        Args:
            step: the training step; 0 is before the first update. Steps must not decrease.
            metrics: name to number (a Python number, or a NumPy or jax scalar). A non-finite value is written as
                null and kept as text under `"nonfinite"`, so that every line is valid JSON.

        Raises:
            ValueError: a name is not in `metric_names`, a value is not a number, or the step decreases.
            UserError: the file cannot be written, for example because the disk is full.
        """
        metric_names.check(metrics)
        if step < self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: call truncate_after first")
        values = {name: _number(name, value) for name, value in metrics.items()}
        nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        row: dict[str, Json] = {"step": int(step)} | {
            n: None if n in nonfinite else v for n, v in values.items()
        }
        if nonfinite:
            row["nonfinite"] = nonfinite
        try:
            self._append(row)
            self._write_events(step, values)
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._last_step = int(step)
        self._send(self._rows, int(step), values)
        self._rows += 1

    def write_samples(
        self, step: int, rows: Iterable[Mapping], folder: str = "rollouts", again: bool = False
    ) -> Path:
        """Write `<folder>/<step>.jsonl` atomically, one response per line, and return its path.

        Args:
            step: added to each row, as in verl (whose keys are input, output, gts, score, step, ...).
            rows: dicts of text, numbers, lists and arrays; non-finite numbers become null.
            folder: "rollouts" for training responses, "validation" for held-out ones.
            again: for the second evaluation at a step, after a warm start: the file is `<step>.warm-started.jsonl`.

        Raises:
            ValueError: unknown folder.
            UserError: the file cannot be written.
        """
        if folder not in SAMPLE_FOLDERS:
            raise ValueError(f"folder must be one of {SAMPLE_FOLDERS}, got {folder!r}")
        path = self.run_dir / folder / f"{step}{AGAIN if again else ''}.jsonl"
        write_file(path, b"".join(dump_line({**row, "step": int(step)}) for row in rows))
        return path

    def write_images(self, images: Iterable[EncodedImage]) -> None:
        """Write a thumbnail `images/<name>.png` of each image whose thumbnail is not there yet.

        Raises:
            UserError: a file cannot be written.
        """
        for image in images:
            path = self.run_dir / IMAGE_FOLDER / f"{image.name}.png"
            if not path.exists():
                write_file(path, png(thumbnail(image.pixels())))

    def truncate_after(self, step: int, evaluations: int | None = None) -> None:
        """Remove the rows and sample files of steps after a checkpoint, and make TensorBoard hide their events.

        Call it on resume, before the first `write`.

        Args:
            step: the checkpoint's step.
            evaluations: the number of held-out evaluations at `step` that the checkpoint includes. Rows of further
                evaluations at `step` are removed, because they will run again. None keeps all.

        Raises:
            UserError: the files cannot be written.
        """
        self.close()
        evaluated = 0

        def keep(row: Mapping) -> bool:
            nonlocal evaluated
            if row["step"] == step and any(name.startswith("val-") for name in row):
                evaluated += 1
                return evaluations is None or evaluated <= evaluations
            return row["step"] <= step

        try:
            self._keep_rows(keep)
            for folder in SAMPLE_FOLDERS:
                for path in (self.run_dir / folder).glob("*.jsonl*"):
                    name, number = path.name.split(".")[0], 2 if AGAIN in path.name else 1
                    uncounted = folder == "validation" and evaluations is not None and number > evaluations
                    first_removed = step if uncounted else step + 1
                    if path.suffix == ".tmp" or (name.isdigit() and int(name) >= first_removed):
                        path.unlink()
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._purge_step = step + 1

    def close(self) -> None:
        """Close the files. A later `write` opens them again."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            with contextlib.suppress(OSError):  # on a full disk, the first error has already been reported
                self._events.close()
        self._file = self._events = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _keep_rows(self, wanted) -> None:
        # Kept lines are copied byte for byte. The file is replaced, atomically, only if a line is removed.
        before = self._path.read_bytes() if self._path.exists() else b""
        rows = [(line, row) for line, row in (_rows(self._path) if before else ()) if wanted(row)]
        after = b"".join(line.removesuffix(b"\n") + b"\n" for line, _ in rows)
        if after != before:
            write_atomically(self._path, after)
        self._last_step = rows[-1][1]["step"] if rows else -1
        self._rows = len(rows)

    def _append(self, row: Mapping) -> None:
        if self._file is None:
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run
        append(self._file, dump_line(row))

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        # tensorboardX's SummaryWriter passes events through a queue to a thread and cannot be flushed
        # synchronously, so a killed run could lose rows of steps before its checkpoint. EventsWriter can.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        now = time.time()
        if self._events is None:
            folder = self.run_dir / "tensorboard"
            folder.mkdir(exist_ok=True)
            # File names contain whole seconds only; the suffix prevents a quick resume from overwriting a file.
            self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
            if self._purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=self._purge_step, wall_time=now, session_log=start))
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.write_event(Event(step=step, wall_time=now, summary=Summary(value=scalars)))
        self._events.flush()


class SampleFile(NamedTuple):
    """A file of responses: the step, whether it is of the step's second evaluation, and the path."""

    step: int
    again: bool
    path: Path


def sample_files(run_dir: str | os.PathLike, folder: str) -> list[SampleFile]:
    """Return the files of a folder of `SAMPLE_FOLDERS` in the order in which they were written; others are left out."""
    found = [
        SampleFile(int(path.name.split(".")[0]), AGAIN in path.name, path)
        for path in (Path(run_dir) / folder).glob("*.jsonl")
        if path.name.removesuffix(".jsonl").removesuffix(AGAIN).isdigit()
    ]
    return sorted(found)


def read_metrics(run_dir: str | os.PathLike) -> list[dict]:
    """Read the rows of a run's `metrics.jsonl`, in order. A truncated last line is skipped.

    Raises:
        UserError: the file does not exist, or a line before the last is damaged.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run_dir} has no {METRICS_FILE}; pass a run directory")
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Yield (line, row) pairs. A damaged last line is skipped: a process killed while writing leaves one."""
    return read_lines(path, _check_row, may_be_torn=True)


def _check_row(row: Mapping) -> None:
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("it has no step")


def _number(name: str, value) -> int | float:
    try:
        value = value.item() if hasattr(value, "item") else value
        return int(value) if isinstance(value, int) else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r} is not a single number: {value!r}") from error
