"""A run directory, read as far as it goes.

Nothing is written, and no file except `metrics.jsonl` and `config.yaml` is read until it is needed. A file or a key
that a run does not have, because it is older, crashed or still going, is named in `Run.missing`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lpo_jax.errors import UserError
from lpo_jax.files import LOCK
from lpo_jax.json_lines import loads, read_object
from lpo_jax.reporting.writers import METRICS_FILE, read_metrics, sample_files
from lpo_jax.types import Json
from lpo_jax.yaml_text import read_yaml

Row = Mapping[str, Json]

# Keys of rollout rows that older runs lack, and what cannot be shown without them.
_LATER_KEYS = {
    "target": "the target w*, the policy P and the coefficient c",
    "gts": "the gold answers",
    "shaped_reward": "shaped rewards",
    "advantage": "advantages",
    "token_logp": "statistics of single tokens",
}


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: the directory.
        config: the resolved settings, by dotted key.
        about: the content of run.json.
        metrics: the rows of metrics.jsonl.
        rollouts: the file of each training step.
        evaluations: the file of each held-out evaluation, by its step and whether it is the second one of that step,
            after a warm start.
        missing: sentences that name what could not be read.
    """

    path: Path
    config: Mapping[str, Json]
    about: Mapping[str, Json]
    metrics: Sequence[Row]
    rollouts: Mapping[int, Path]
    evaluations: Mapping[tuple[int, bool], Path]
    missing: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.resolve().name

    @property
    def last_step(self) -> int:
        """The step of the last row of metrics; 0 if there is none."""
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def total_steps(self) -> int | None:
        """The number of steps that the run was started for, if its config names one."""
        key = "warm_start.steps" if self.about.get("kind") == "sft" else "training.steps"
        steps = self.config.get(key)
        return steps if isinstance(steps, int) else None


def read_run(path: str | os.PathLike) -> Run:
    """Read a run directory.

    Args:
        path: the directory of `lpo train`, `lpo sft` or `lpo meta`, or one cell of `lpo compare`.

    Raises:
        UserError: the path is no directory, or nothing in it belongs to a run.
    """
    path = Path(path)
    missing: list[str] = []
    if not path.is_dir():
        raise UserError(f"{path}: is not a directory; pass the directory of a run (its config's `output`)")
    rollouts = {file.step: file.path for file in sample_files(path, "rollouts")}
    evaluations = {(file.step, file.again): file.path for file in sample_files(path, "validation")}
    config, about = _read_config(path, missing), _read_about(path, missing)
    metrics = _read_metrics(path, missing)
    if not (metrics or rollouts or evaluations):
        cells = [cell for cell in ("cells", "warm") if (path / cell).is_dir()]
        hint = f"; it is a comparison: pass one of the directories in {path}/cells" if cells else ""
        if not cells and (path / "config.yaml").is_file():
            hint = "; the run has not finished its first evaluation or step yet"
        raise UserError(
            f"{path}: holds no records of a run (no {METRICS_FILE}, rollouts or validation){hint}"
        )
    if about.get("verifier_failed"):
        missing.append("The last start ended because its verifier failed on every response.")
    if not rollouts:
        missing.append("There are no rollout files, so no groups can be shown.")
    else:
        missing += _missing_keys(rollouts)
        learned = {row["step"] for row in metrics if any(name.startswith("actor/") for name in row)}
        if lost := sorted(learned - rollouts.keys()):
            missing.append(f"The rollout files of {_steps(lost)} are missing.")
    if not evaluations:
        missing.append("There are no held-out responses, so changes have no interval.")
    return Run(path, config, about, metrics, rollouts, evaluations, tuple(missing))


def read_samples(path: Path) -> tuple[list[dict[str, Json]], list[str]]:
    """Read the rows of a rollout or evaluation file, leaving out lines that are damaged.

    Returns:
        The rows, and sentences about what was left out.
    """
    rows, damaged = [], []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict) and isinstance(row.get("output"), str):
                    rows.append(row)
                else:
                    damaged.append(number)
    except OSError as error:
        return [], [f"{path.parent.name}/{path.name} cannot be read ({error.strerror})."]
    where = f"{path.parent.name}/{path.name}"
    notes = (
        [f"{where}: damaged lines left out: {len(damaged)}, the first is line {damaged[0]}."]
        if damaged
        else []
    )
    return rows, notes


def groups_of(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Split the rows of a step into groups: the responses to one prompt, in the order of the file."""
    group: list[Row] = []
    for row in rows:
        if group and (row.get("id") != group[-1].get("id") or _index(row) <= _index(group[-1])):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def status(run: Run) -> str:
    """Return "running", "finished" or "stopped".

    A run is going on if a process holds the lock of its directory. The locks are read from /proc, without taking
    them. Where there is no /proc, a run that has not finished counts as stopped.
    """
    if _locked(run.path / LOCK):
        return "running"
    total = run.total_steps
    return "finished" if total is not None and run.last_step >= total else "stopped"


def flatten(values: Json, key: str = "") -> dict[str, Json]:
    """Return the leaves of a tree of settings by dotted key."""
    if not isinstance(values, dict) or not values:
        return {key: values}
    leaves: dict[str, Json] = {}
    for name, value in values.items():
        leaves |= flatten(value, f"{key}.{name}" if key else str(name))
    return leaves


def finite_number(value: Json) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def _index(row: Row) -> int:
    k = row.get("k")
    return k if isinstance(k, int) else 0


def _read_config(path: Path, missing: list[str]) -> dict[str, Json]:
    try:
        values = read_yaml(path / "config.yaml", "config")
    except UserError as error:
        missing.append(f"The config cannot be read: {error}.")
        return {}
    if not isinstance(values, dict):
        missing.append("config.yaml holds no settings.")
        return {}
    return flatten(values)


def _read_about(path: Path, missing: list[str]) -> dict[str, Json]:
    if not (path / "run.json").is_file():
        missing.append("There is no run.json, so versions and devices are unknown.")
        return {}
    try:
        return read_object(path / "run.json", "its facts are left out")
    except UserError as error:
        missing.append(f"{error}.")
        return {}


def _read_metrics(path: Path, missing: list[str]) -> list[dict[str, Json]]:
    try:
        return read_metrics(path)
    except UserError as error:
        missing.append(f"The metrics cannot be read: {error}.")
        return []


def _missing_keys(rollouts: Mapping[int, Path]) -> list[str]:
    rows, _ = read_samples(rollouts[max(rollouts)])
    keys = {key for row in rows for key in row}
    lacking = [what for key, what in _LATER_KEYS.items() if rows and key not in keys]
    return [f"The rollout files do not hold {', '.join(lacking)}."] if lacking else []


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:8])) + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")
    return f"step{'s' * (len(steps) > 1)} {shown}"


def _locked(lock: Path) -> bool:
    try:
        inode = lock.stat().st_ino
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    # 1: FLOCK  ADVISORY  WRITE 4242 08:01:1835 0 EOF
    return any(part.endswith(f":{inode}") for line in locks.splitlines() for part in line.split())
