"""Optional copies of a run's metrics in Weights & Biases and in trackio, next to `metrics.jsonl`.

A resumed run continues the same run there. The rows that it writes again equal the ones before, so they are not sent
again: `trackers.json` in the run directory counts the rows that were sent.
"""

import contextlib
import importlib.util
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from lpo_jax.errors import UserError
from lpo_jax.files import write_file
from lpo_jax.json_lines import read_object
from lpo_jax.types import Json

STATE_FILE = "trackers.json"
NONE = "none"


class Tracker(NamedTuple):
    """An open run of a tracking library: a function that takes a step and its metrics, and one that ends the run."""

    log: Callable[[int, dict[str, float]], None]
    finish: Callable[[], None]


def require_trackers(projects: Mapping[str, str]) -> None:
    """Check that the libraries of the trackers with a project are installed.

    Args:
        projects: project by tracker; `NONE` for a tracker that is not used.

    Raises:
        UserError: one is not installed.
    """
    for name, project in projects.items():
        if project != NONE and importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracking.{name} = {project}: the package {name} is not installed; pip install 'lpo_jax[{name}]'"
            )


class Trackers(contextlib.ExitStack):
    """The trackers of one run.

    Args:
        run_dir: the run directory; its name is the name of the run.
        projects: project by tracker, as in `require_trackers`.
        config: of the run, as plain values.
    """

    def __init__(self, run_dir: str | os.PathLike, projects: Mapping[str, str], config: Json):
        super().__init__()
        self._path, self._open, self._sent = Path(run_dir) / STATE_FILE, list[Tracker](), 0
        chosen = {name: project for name, project in projects.items() if project != NONE}
        if not chosen:
            return
        fresh: dict[str, Json] = {"id": uuid.uuid4().hex[:8], "rows": 0}
        state = read_object(self._path, "remove it") if self._path.exists() else fresh
        self._id, self._sent = state["id"], state["rows"]
        for name, project in chosen.items():
            tracker = OPEN[name](project, self._id, Path(run_dir), config)
            self.callback(tracker.finish)
            self._open.append(tracker)

    def send(self, index: int, step: int, values: Mapping[str, float]) -> None:
        """Send a row of metrics, unless it was sent before a resume.

        Args:
            index: of the row in `metrics.jsonl`.
            step: of the row.
            values: finite numbers are sent.
        """
        if not self._open or index < self._sent:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self._open:
            tracker.log(step, finite)
        self._sent = index + 1
        write_file(self._path, json.dumps({"id": self._id, "rows": self._sent}))


def _open_wandb(project: str, identity: str, run_dir: Path, config: Json) -> Tracker:
    import wandb

    run = wandb.init(
        project=project, id=identity, name=run_dir.name, resume="allow", dir=str(run_dir), config=config
    )
    # Rows have their own step, because wandb's may not go back, and a step can have several rows.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Tracker(lambda step, values: run.log({"step": step, **values}), run.finish)


def _open_trackio(project: str, identity: str, run_dir: Path, config: Json) -> Tracker:
    import trackio

    run = trackio.init(
        project,
        name=f"{run_dir.name}-{identity}",
        resume="allow",
        config=config,
        embed=False,
        auto_log_gpu=False,
    )
    return Tracker(lambda step, values: run.log(values, step=step), run.finish)


OPEN = {"wandb": _open_wandb, "trackio": _open_trackio}
