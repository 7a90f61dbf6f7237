"""What a finished cell leaves for the table: how often each held-out problem was solved, and its curves.

Made from the run's own files, which may then go: a comparison of many cells is read from small files alone.

Axes: E evaluations · P held-out problems.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np

from lpo_jax import reporting
from lpo_jax.files import write_file
from lpo_jax.json_lines import read_object, read_rows

FILE = "outcome.json"

# Panels of the figures: metric of metrics.jsonl -> (title, unit).
CURVES = {
    "actor/entropy": ("Entropy of the policy", "nats per token"),
    "actor/grad_norm": ("Gradient norm", "before clipping"),
    "response_length/mean": ("Response length", "tokens"),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A cell's results.

    Attributes:
      evaluated: `[E]` steps of the held-out evaluations.
      passed, valid: `[E, P]` samples of each problem that pass, and that count.
      steps: of `curves`.
      curves: metric -> a number a step, `CURVES` and no others; NaN where the run had none.
      seconds: of training and evaluating.
      surroundings: the run's versions and devices.
    """

    evaluated: np.ndarray
    passed: np.ndarray
    valid: np.ndarray
    steps: np.ndarray
    curves: dict[str, np.ndarray]
    seconds: float
    surroundings: dict

    def save(self, run: Path) -> None:
        """Whole or not at all: the file is what tells a finished cell from others."""
        values = dataclasses.asdict(self)
        values["curves"] = {k: [None if np.isnan(x) else x for x in v] for k, v in self.curves.items()}
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
        write_file(run / FILE, json.dumps(plain))

    @classmethod
    def load(cls, run: Path) -> "Outcome | None":
        """What `save` wrote, or None where the cell is not finished."""
        if not (run / FILE).exists():
            return None
        held = read_object(run / FILE, "remove the cell's directory, and --resume runs it again")
        arrays = {k: np.array(held[k], int) for k in ("evaluated", "passed", "valid", "steps")}
        curves = {k: np.array(v, float) for k, v in held["curves"].items()}
        return cls(**{**held, **arrays, "curves": curves})


def read_outcome(run: Path) -> Outcome:
    """The outcome of a run directory whose training has ended."""
    evaluated = sorted(int(path.stem) for path in (run / "validation").glob("*.jsonl") if path.stem.isdigit())
    counts = [_count(run / "validation" / f"{step}.jsonl") for step in evaluated]
    rows = reporting.read_metrics(run)
    trained = [row for row in rows if "timing_s/step" in row]
    spent = ("timing_s/step", "timing_s/testing", "timing_s/save_checkpoint")
    return Outcome(
        evaluated=np.array(evaluated),
        passed=np.array([passed for passed, _ in counts]),
        valid=np.array([valid for _, valid in counts]),
        steps=np.array([row["step"] for row in trained], int),
        curves={name: np.array([row.get(name) for row in trained], float) for name in CURVES},
        seconds=sum(row.get(name, 0.0) for row in rows for name in spent),
        surroundings=read_object(run / "run.json", "remove it, and --resume writes a new one"),
    )


def _count(path: Path) -> tuple[list[int], list[int]]:
    """Passing and valid samples of each problem of one evaluation, problems in the order of their ids."""
    passed: Counter = Counter()
    valid: Counter = Counter()
    ids = set()
    for record in read_rows(path, needs=("id", "outcome")):
        ids.add(record["id"])
        valid[record["id"]] += record["outcome"] != "infrastructure"
        passed[record["id"]] += record["outcome"] == "pass"
    return [passed[i] for i in sorted(ids)], [valid[i] for i in sorted(ids)]
