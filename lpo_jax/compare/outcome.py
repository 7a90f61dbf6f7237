"""The results of a finished cell: the number of passing samples of each held-out problem, and curves.

They are computed from the run's files and saved in one small file, from which the report is made.

Axes: E evaluations · P held-out problems · N steps.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np

from lpo_jax import reporting
from lpo_jax.files import write_file
from lpo_jax.json_lines import read_object, read_rows
from lpo_jax.reporting.writers import sample_files

FILE = "outcome.json"

# Curves in the figures: metric of metrics.jsonl -> (title, unit).
CURVES = {
    "actor/entropy": ("Entropy of the policy", "nats per token"),
    "actor/grad_norm": ("Gradient norm", "before clipping"),
    "response_length/mean": ("Response length", "tokens"),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of a cell.

    Attributes:
      evaluated: `[E]` steps of the held-out evaluations.
      passed: `[E, P]` number of passing samples of each problem.
      valid: `[E, P]` number of valid samples of each problem.
      steps: `[N]` steps of the curves.
      curves: metric -> `[N]` values for the metrics of `CURVES`; NaN where the run has none.
      seconds: wall time of training and evaluation.
      surroundings: the content of run.json: versions and devices.
    """

    evaluated: np.ndarray
    passed: np.ndarray
    valid: np.ndarray
    steps: np.ndarray
    curves: dict[str, np.ndarray]
    seconds: float
    surroundings: dict

    def save(self, run: Path) -> None:
        """Write the file atomically: a cell is finished if and only if the file exists."""
        values = dataclasses.asdict(self)
        values["curves"] = {k: [None if np.isnan(x) else x for x in v] for k, v in self.curves.items()}
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
        write_file(run / FILE, json.dumps(plain))

    @classmethod
    def load(cls, run: Path) -> "Outcome | None":
        """Read the file that `save` wrote; None if the cell is not finished.

        Raises:
          UserError: the file is damaged.
        """
        if not (run / FILE).exists():
            return None
        held = read_object(run / FILE, "remove the cell's directory, and --resume runs it again")
        arrays = {k: np.array(held[k], int) for k in ("evaluated", "passed", "valid", "steps")}
        curves = {k: np.array(v, float) for k, v in held["curves"].items()}
        return cls(**{**held, **arrays, "curves": curves})


def read_outcome(run: Path) -> Outcome:
    """Compute the results of a finished run from the files in its directory."""
    files = {
        file.step: file.path for file in sample_files(run, "validation")
    }  # of a step, the last evaluation
    counts = [_count(path) for path in files.values()]
    rows = reporting.read_metrics(run)
    trained = [row for row in rows if "timing_s/step" in row]
    spent = ("timing_s/step", "timing_s/testing", "timing_s/save_checkpoint")
    return Outcome(
        evaluated=np.array(list(files)),
        passed=np.array([passed for passed, _ in counts]),
        valid=np.array([valid for _, valid in counts]),
        steps=np.array([row["step"] for row in trained], int),
        curves={name: np.array([row.get(name) for row in trained], float) for name in CURVES},
        seconds=sum(row.get(name, 0.0) for row in rows for name in spent),
        surroundings=read_object(run / "run.json", "remove it, and --resume writes a new one"),
    )


def _count(path: Path) -> tuple[list[int], list[int]]:
    """Count the passing and the valid samples of each problem of one evaluation, ordered by problem id."""
    passed: Counter = Counter()
    valid: Counter = Counter()
    ids = set()
    for record in read_rows(path, needs=("id", "outcome")):
        ids.add(record["id"])
        valid[record["id"]] += record["outcome"] != "infrastructure"
        passed[record["id"]] += record["outcome"] == "pass"
    return [passed[i] for i in sorted(ids)], [valid[i] for i in sorted(ids)]
