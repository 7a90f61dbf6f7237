"""The numbers of a comparison: outcomes of cells, scores of each method, and paired differences between methods.

Outcomes are computed from the files of runs and saved in one small file for each cell. The table is a function of them
alone, so a comparison that was killed and resumed has the same table.

Axes: R rules · S seeds · E evaluations · P held-out problems · N steps.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import special

from lpo_jax import reporting
from lpo_jax.compare.grid import Grid
from lpo_jax.evaluation.metrics import pass_at_k
from lpo_jax.files import write_file
from lpo_jax.json_lines import read_object, read_rows
from lpo_jax.reporting.writers import sample_files
from lpo_jax.types import Json

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
    # Of a step, the last evaluation.
    files = {file.step: file.path for file in sample_files(run, "validation")}
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


CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and problems.

    Attributes:
      mean: the mean.
      low: lower bound of the 95% interval; NaN with one seed.
      high: upper bound of the 95% interval; NaN with one seed.
      wins: number of seeds whose mean over the problems is above 0.
      pairs: number of seeds.
    """

    mean: float
    low: float
    high: float
    wins: int
    pairs: int


def solved(passed: np.ndarray, valid: np.ndarray, k: int) -> np.ndarray:
    """Compute pass@k of each problem from counts of any shape; NaN where fewer than k samples are valid."""
    return pass_at_k(valid, passed, k)


def estimate_mean(values: np.ndarray) -> Estimate:
    """Estimate the mean of `values [S, P]` and its 95% interval.

    Problems with NaN at any seed are excluded. With one seed the interval is NaN, because the variance over seeds is
    unknown.

    References:
      Searle, Casella and McCulloch, "Variance Components", 1992, chapter 4; Satterthwaite 1946.
    """
    values = np.asarray(values, np.float64)
    values = values[:, ~np.isnan(values).any(axis=0)]
    S, P = values.shape
    if P == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, S)
    mean, wins = float(values.mean()), int((values.mean(axis=1) > 0).sum())
    if S < 2:
        return Estimate(mean, float("nan"), float("nan"), wins, S)
    variance, freedom = variance_of_mean(values)
    half = special.stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(variance)
    return Estimate(mean, mean - half, mean + half, wins, S)


def variance_of_mean(values: np.ndarray) -> tuple[float, float]:
    """Estimate the variance of the mean of `values [S, P]` over seeds and problems, and its degrees of freedom.

    The values are differences between two methods, paired by seed and problem, which cancels the effects that the two
    methods share. They have two sources of variance: another seed would train another model, and other problems could
    be easier for one of the methods. All seeds are evaluated on the same problems, so seeds and problems are crossed
    random effects, and by the analysis of variance the variance of the mean difference is
    sigma_s^2 / S + sigma_p^2 / P + sigma_e^2 / (S P), where e contains the interaction of seed and problem and the
    noise of single samples. Resampling seeds and problems (the pigeonhole bootstrap) would count e three times, and e
    dominates here; quantiles of five resampled seeds would be too narrow. Student's t with Satterthwaite's degrees of
    freedom accounts for the small number of seeds.

    Each mean square is at least the noise mean square, because seeds that agree by chance are no evidence that other
    seeds would agree. The intervals are therefore conservative if seeds differ only by noise.
    """
    S, P = values.shape
    by_seed, by_problem = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    if P == 1:
        return values.var(ddof=1) / S, S - 1
    rest = (S - 1) * (P - 1)
    noise = np.square(values - by_seed - by_problem + values.mean()).sum() / rest
    # Mean squares, each of which includes the noise once.
    seeds, problems = max(P * by_seed.var(ddof=1), noise), max(S * by_problem.var(ddof=1), noise)
    total = seeds + problems - noise
    if total == 0:
        return 0.0, S - 1
    spread = seeds**2 / (S - 1) + problems**2 / (P - 1) + noise**2 / rest
    return total / (S * P), max(total**2 / spread, S - 1)


Outcomes = Mapping[tuple[str, str, int], Outcome]  # by (rule, method, seed)

POOLED = "all"  # stands for the mean over the rules at each seed and problem


def make_table(grid: Grid, outcomes: Outcomes) -> dict[str, Json]:
    """Compute the content of `table.json`.

    Args:
      grid: the grid of the comparison.
      outcomes: the finished cells.

    Returns:
      A dict with sizes, the names of the `missing` cells, `scores[rule][method][measure]` and
      `differences[against][rule][method][measure]`. A score is `{"mean", "low", "high"}`, a difference is
      `{"mean", "low", "high", "wins", "pairs"}`; low and high bound the 95% interval.
    """
    first = next(iter(outcomes.values()))
    k = int(first.valid.max())
    rules = (*grid.rules, POOLED) if len(grid.rules) > 1 else grid.rules
    values = {
        (rule, method, seed): measures(outcome, k) for (rule, method, seed), outcome in outcomes.items()
    }
    scores = {rule: {m: _scores(values, rule, m, grid) for m in grid.methods} for rule in grid.rules}

    def against(other: str, rule: str) -> dict[str, dict]:
        return {m: _difference(values, rule, m, other, grid) for m in grid.methods if m != other}

    differences = {other: {rule: against(other, rule) for rule in rules} for other in grid.against}
    return {
        "rules": list(grid.rules),
        "methods": list(grid.methods),
        "seeds": list(grid.seeds),
        "problems": int(first.passed.shape[1]),
        "samples_per_problem": k,
        "evaluated_after": first.evaluated.tolist(),
        "start": {name: _number(v) for name, v in _start(outcomes, k).items()},
        "missing": [cell.name for cell in grid.cells if (cell.rule, cell.method, cell.seed) not in outcomes],
        "scores": scores,
        "differences": differences,
    }


def measures(outcome: Outcome, k: int) -> dict[str, np.ndarray]:
    """Compute the compared measures of a cell: `[P]` for pass@1 and pass@k, `[1]` for curves.

    "final" measures are from the last evaluation. "mean" measures are over all evaluations except the one before
    training.
    """
    found = {}
    for name, n in (("pass@1", 1), (f"pass@{k}", k)):
        by_step = solved(outcome.passed, outcome.valid, n)  # [E, P]
        found[f"final {name}"] = by_step[-1]
        found[f"mean {name}"] = by_step[outcome.evaluated > 0].mean(axis=0)
    for name in CURVES:
        curve = outcome.curves[name]
        found[f"mean {name}"] = np.array([np.nanmean(curve) if curve.size else np.nan])
    norms = outcome.curves["actor/grad_norm"]
    found["spread actor/grad_norm"] = np.array(
        [np.nanstd(norms) / np.nanmean(norms) if norms.size else np.nan]
    )
    return found


def _scores(values: Mapping, rule: str, method: str, grid: Grid) -> dict[str, dict[str, float]]:
    """The estimates of all measures of a method over the seeds with results."""
    found = [values[rule, method, seed] for seed in grid.seeds if (rule, method, seed) in values]
    names = found[0] if found else ()
    return {name: _number(estimate_mean(np.stack([v[name] for v in found]))) for name in names}


def _difference(values: Mapping, rule: str, method: str, other: str, grid: Grid) -> dict[str, dict]:
    """All measures of `method` minus those of `other`, over the seeds that both have finished.

    For the rule `POOLED`, the difference of a seed is the mean over the rules, and wins are counted over all rules.
    """
    rules = grid.rules if rule == POOLED else (rule,)
    seeds = [s for s in grid.seeds if all((r, m, s) in values for r in rules for m in (method, other))]
    if not seeds:
        return {}
    found = {}
    for name in values[rules[0], method, seeds[0]]:
        by_rule = np.array(
            [[values[r, method, s][name] - values[r, other, s][name] for s in seeds] for r in rules]
        )  # [R, S, P]
        wins = int((np.nanmean(by_rule, axis=2) > 0).sum())
        whole = dataclasses.asdict(estimate_mean(by_rule.mean(axis=0)))
        found[name] = whole | {"wins": wins, "pairs": len(rules) * len(seeds)}
    return found


def _start(outcomes: Outcomes, k: int) -> dict[str, Estimate]:
    """The scores of the common model before training; each seed has its own samples."""
    by_seed = {seed: outcome for (_, _, seed), outcome in outcomes.items()}
    return {
        f"pass@{n}": estimate_mean(np.stack([solved(o.passed[0], o.valid[0], n) for o in by_seed.values()]))
        for n in (1, k)
    }


def _number(of: Estimate) -> dict[str, float]:
    return {"mean": of.mean, "low": of.low, "high": of.high}
