"""The numbers of a comparison: every method's scores, and how it differs from others at the same seeds.

Everything here follows from the outcomes alone, so that a comparison that was killed and resumed has the same table.

Axes: R rules · S seeds · E evaluations · P held-out problems.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lpo_jax.compare.grid import Grid
from lpo_jax.compare.outcome import CURVES, Outcome
from lpo_jax.compare.pairs import Estimate, estimate_mean, solved

Outcomes = Mapping[tuple[str, str, int], Outcome]  # by rule, method, seed

POOLED = "all"  # the mean over the rules, at each seed and problem


def make_table(grid: Grid, outcomes: Outcomes) -> dict[str, Any]:
    """Build the report's table as JSON values: sizes, `scores[rule][method][measure]` and
    `differences[against][rule][method][measure]`.

    A number is `{"mean", "low", "high"}`; a difference is `{"mean", "low", "high", "wins", "pairs"}`. Cells that
    are missing are left out, and named.
    """
    some = next(iter(outcomes.values()))
    k = int(some.valid.max())
    rules = (*grid.rules, POOLED) if len(grid.rules) > 1 else grid.rules
    values = {
        (rule, method, seed): measures(outcome, k) for (rule, method, seed), outcome in outcomes.items()
    }
    scores = {
        rule: {
            method: {
                name: _number(estimate_mean(v)) for name, v in _stacked(values, rule, method, grid).items()
            }
            for method in grid.methods
        }
        for rule in grid.rules
    }
    differences = {
        other: {
            rule: {
                method: _difference(values, rule, method, other, grid)
                for method in grid.methods
                if method != other
            }
            for rule in rules
        }
        for other in grid.against
    }
    return {
        "rules": list(grid.rules),
        "methods": list(grid.methods),
        "seeds": list(grid.seeds),
        "problems": int(some.passed.shape[1]),
        "samples_per_problem": k,
        "evaluated_after": some.evaluated.tolist(),
        "start": {name: _number(v) for name, v in _start(outcomes, k).items()},
        "missing": [cell.name for cell in grid.cells if (cell.rule, cell.method, cell.seed) not in outcomes],
        "scores": scores,
        "differences": differences,
    }


def measures(outcome: Outcome, k: int) -> dict[str, np.ndarray]:
    """What is compared, `[P]` each for scores on problems and `[1]` for curves.

    "mean" is over the evaluations after training has begun: how much was solved on the way, not at the end alone.
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


def _stacked(values: Mapping, rule: str, method: str, grid: Grid) -> dict[str, np.ndarray]:
    """Every measure `[S, P]` of the seeds that are there."""
    found = [values[rule, method, seed] for seed in grid.seeds if (rule, method, seed) in values]
    return {name: np.stack([v[name] for v in found]) for name in (found[0] if found else ())}


def _difference(values: Mapping, rule: str, method: str, other: str, grid: Grid) -> dict[str, dict]:
    """Every measure of `method` less that of `other`, at the seeds that both have.

    Over all rules the mean of the rules' differences is estimated, seed by seed, and every rule's wins count.
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
    """The scores of the common model before any training; every seed draws its own samples of it."""
    by_seed = {seed: outcome for (_, _, seed), outcome in outcomes.items()}
    first = lambda outcome, n: solved(outcome.passed[0], outcome.valid[0], n)  # noqa: E731
    return {f"pass@{n}": estimate_mean(np.stack([first(o, n) for o in by_seed.values()])) for n in (1, k)}


def _number(of: Estimate) -> dict[str, float]:
    return {"mean": of.mean, "low": of.low, "high": of.high}
