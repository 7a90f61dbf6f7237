"""Did the run learn? One sentence from its held-out evaluations, with an interval.

The score is what `evaluation.score` names: the share of samples that pass, the reward, or a part of the verdict.

Axes: P held-out problems · N samples of each.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpo_jax.evaluation.metrics import score_difference
from lpo_jax.inspection.load import Row, Run, finite_number, read_samples
from lpo_jax.reporting.metric_names import heldout_score
from lpo_jax.reporting.text import percent
from lpo_jax.types import Json

_DATA = re.compile(r"val-core/(.+)/(?:score/mean@\d+|acc/pass@1)")


@dataclass(frozen=True)
class Headline:
    """The answer to "did it learn": `kind` is "better", "worse", "unclear" or "unknown"."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Score:
    """The score of one held-out evaluation."""

    step: int
    data: str
    mean: float


def scores(run: Run) -> list[Score]:
    """Return the held-out evaluations of a run in their order. The one before a warm start is first."""
    found = []
    for row in run.metrics:
        names = [match[1] for name in row if (match := _DATA.fullmatch(name))]
        score = heldout_score(row)
        if names and score is not None:
            found.append(Score(row["step"], names[0], score[0]))
    return found


def judge(run: Run) -> Headline:
    """Compare the last held-out evaluation with the start of RL, and with the base model before a warm start."""
    found = scores(run)
    if not found:
        return Headline("unknown", "The run has no held-out evaluation, so it is unknown whether it learned.")
    name = _score_name(run)
    what = "pass@1" if name == "pass" else name
    show = percent if name == "pass" else lambda value: f"{value:.3g}"
    last = found[-1]
    at_start = [score for score in found if score.step == found[0].step]
    start = at_start[-1]
    if last.step == start.step:
        return Headline(
            "unknown",
            f"Held-out {last.data} {what} is {show(last.mean)} at step {last.step}; nothing to compare it with yet.",
        )
    warm = len(at_start) > 1
    base = f" The base model had {show(at_start[0].mean)} before its warm start." if warm else ""
    origin = "the warm-started model" if warm else f"the model at step {start.step}"
    change = f"from {show(start.mean)} ({origin}) to {show(last.mean)} at step {last.step}"
    scale, unit, digits = (100, " points", 1) if name == "pass" else (1, "", 3)
    difference = f"{scale * (last.mean - start.mean):+.{digits}f}{unit}"
    interval = _interval(run, name, start.step, last.step)
    if interval is None:
        return Headline(
            "unclear",
            f"Held-out {last.data} {what} went {change}: {difference}, without an interval, because the responses of "
            f"both evaluations are not on disk.{base}",
        )
    low, high = scale * interval["ci_low"], scale * interval["ci_high"]
    span = f"{difference}, 95% interval {low:+.{digits}f} to {high:+.{digits}f} over {interval['problems']} problems"
    if low > 0:
        return Headline("better", f"It learned: held-out {last.data} {what} rose {change} ({span}).{base}")
    if high < 0:
        return Headline("worse", f"It got worse: held-out {last.data} {what} fell {change} ({span}).{base}")
    return Headline(
        "unclear",
        f"No change that can be distinguished from chance: held-out {last.data} {what} went {change} ({span}).{base}",
    )


def _score_name(run: Run) -> str:
    """What the run maximises. Older runs do not record what `auto` stood for; most tasks name `pass`."""
    configured = run.config.get("evaluation.score")
    return str(run.about.get("score") or (configured if configured not in (None, "auto") else "pass"))


def _interval(run: Run, name: str, start: int, last: int) -> Mapping[str, Json] | None:
    """The paired interval between the last evaluations of two steps, if both have files with the same problems."""
    files = {step: path for (step, _), path in sorted(run.evaluations.items())}  # the last of a step counts
    if start not in files or last not in files:
        return None
    before, after = _scores_of(files[start], name), _scores_of(files[last], name)
    shared = [problem for problem in before if problem in after]
    if not shared:
        return None
    x, y = (_matrix([of[problem] for problem in shared]) for of in (before, after))
    difference = score_difference(np.nan_to_num(x), np.nan_to_num(y), ~np.isnan(x), ~np.isnan(y))
    return difference if math.isfinite(difference["ci_low"]) else None


def _scores_of(path: Path, name: str) -> dict[str, list[float]]:
    """The scores of the samples of each problem; NaN where the verifier failed."""
    found: dict[str, list[float]] = {}
    for row in read_samples(path)[0]:
        failed = row.get("outcome") == "infrastructure"
        found.setdefault(str(row.get("id")), []).append(math.nan if failed else _score(row, name))
    return found


def _score(row: Row, name: str) -> float:
    if name == "pass":
        return float(row.get("outcome") == "pass")
    parts = row.get("parts") if isinstance(row.get("parts"), dict) else {}
    return finite_number(row.get("score") if name == "reward" else parts.get(name)) or 0.0


def _matrix(lists: Sequence[Sequence[float]]) -> np.ndarray:
    width = max(map(len, lists))
    return np.array([[*items, *[math.nan] * (width - len(items))] for items in lists])
