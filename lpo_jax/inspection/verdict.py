"""Did the run learn? One sentence from its held-out evaluations, with an interval, and the words for its parts.

Axes: P held-out problems · N samples of each.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpo_jax.evaluation.metrics import paired_difference
from lpo_jax.inspection.load import Run, number, read_samples
from lpo_jax.reporting.text import percent
from lpo_jax.types import Json

_PASS_1 = re.compile(r"val-core/(.+)/acc/pass@1")


@dataclass(frozen=True)
class Diagnosis:
    """Something that is wrong with a run.

    Attributes:
        name: what, such as "groups without signal".
        evidence: the numbers that show it.
        remedy: what to do.
        steps: the steps at which it was seen.
    """

    name: str
    evidence: str
    remedy: str
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Headline:
    """The answer to "did it learn": `kind` is "better", "worse", "unclear" or "unknown"."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Score:
    """One held-out evaluation: pass@1 with its interval, where it was computed."""

    step: int
    data: str
    mean: float
    low: float | None
    high: float | None


def scores(run: Run) -> list[Score]:
    """Return the held-out evaluations of a run in their order. The one before a warm start is first."""
    found = []
    for row in run.metrics:
        for name, value in row.items():
            match = _PASS_1.fullmatch(name)
            if match and (mean := number(value)) is not None:
                around = f"val-aux/{match[1]}/acc/pass@1"
                low, high = number(row.get(f"{around}/ci_low")), number(row.get(f"{around}/ci_high"))
                found.append(Score(row["step"], match[1], mean, low, high))
    return found


def judge(run: Run) -> Headline:
    """Compare the last held-out evaluation with the start of RL, and with the base model before a warm start."""
    found = scores(run)
    if not found:
        return Headline("unknown", "The run has no held-out evaluation, so it is unknown whether it learned.")
    first, last = found[0], found[-1]
    at_start = [score for score in found if score.step == first.step and score.data == last.data]
    start = at_start[-1] if at_start else first
    if last.step == start.step:
        return Headline(
            "unknown",
            f"Held-out {last.data} pass@1 is {percent(last.mean)} at step {last.step}; nothing to compare it with yet.",
        )
    warm = len(at_start) > 1
    base = f" The base model passed {percent(at_start[0].mean)} before its warm start." if warm else ""
    origin = "the warm-started model" if warm else f"the model at step {start.step}"
    change = f"from {percent(start.mean)} ({origin}) to {percent(last.mean)} at step {last.step}"
    points = 100 * (last.mean - start.mean)
    interval = _interval(run, start.step, last.step)
    if interval is None:
        return Headline(
            "unclear",
            f"Held-out {last.data} pass@1 went {change}: {points:+.1f} points, without an interval, because the "
            f"responses of both evaluations are not on disk.{base}",
        )
    low, high = 100 * interval["ci_low"], 100 * interval["ci_high"]
    span = (
        f"{points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f} over {interval['problems']} problems"
    )
    if low > 0:
        return Headline("better", f"It learned: held-out {last.data} pass@1 rose {change} ({span}).{base}")
    if high < 0:
        return Headline("worse", f"It got worse: held-out {last.data} pass@1 fell {change} ({span}).{base}")
    return Headline(
        "unclear",
        f"No change that can be distinguished from chance: held-out {last.data} pass@1 went {change} ({span}).{base}",
    )


def _interval(run: Run, start: int, last: int) -> Mapping[str, Json] | None:
    """The paired interval between the last evaluations of two steps, if both have files with the same problems."""
    files = {step: path for (step, _), path in run.evaluations.items()}  # the last of a step counts
    labelled = {step: path for (step, label), path in run.evaluations.items() if not label.startswith("cold")}
    files |= labelled
    if start not in files or last not in files:
        return None
    before, after = _passed(files[start]), _passed(files[last])
    shared = [problem for problem in before if problem in after]
    if not shared:
        return None
    flags, valid = [_matrix([of[problem] for problem in shared]) for of in (before, after)], []
    valid = [~np.isnan(x) for x in flags]
    if min(x.shape[1] for x in flags) == 0:
        return None
    difference = paired_difference(flags[0] == 1, flags[1] == 1, valid[0], valid[1], ks=(1,))["pass@1"]
    return difference if np.isfinite(difference["ci_low"]) else None


def _passed(path: Path) -> dict[Json, list[float]]:
    passed: dict[Json, list[float]] = {}
    for row in read_samples(path)[0]:
        masked = row.get("outcome") == "infrastructure"
        passed.setdefault(str(row.get("id")), []).append(
            float("nan") if masked else float(row.get("outcome") == "pass")
        )
    return passed


def _matrix(lists: Sequence[Sequence[float]]) -> np.ndarray:
    width = max(map(len, lists))
    return np.array([[*items, *[float("nan")] * (width - len(items))] for items in lists])
