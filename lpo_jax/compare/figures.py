"""The figures of a comparison as PNG files: curves for each rule, and all paired differences.

The panels are those of figures 3, 4 and 5 of the LPO paper. Lines are means over seeds; bands are one standard error
of the mean to either side.
"""

from pathlib import Path

import numpy as np

from lpo_jax.compare.grid import Grid
from lpo_jax.compare.table import CURVES, POOLED, Outcomes, solved
from lpo_jax.reporting.plots import COLORS, Panel, panel_axes, style_axes
from lpo_jax.types import Json

DPI = 90
_TICKS = (-100, -30, -10, -3, -2, -1, 0, 1, 2, 3, 10, 30, 100)  # percentage points


def save_figures(folder: Path, grid: Grid, outcomes: Outcomes, table: dict[str, Json]) -> list[Path]:
    """Draw `<rule>.png` for each rule with results, and `differences.png`; return their paths."""
    drawn = {}
    for rule in grid.rules:
        if any(key[0] == rule for key in outcomes):
            drawn[f"{rule}.png"] = draw_curves(rule, grid, outcomes, table["samples_per_problem"])
    drawn["differences.png"] = draw_differences(table)
    for name, figure in drawn.items():
        figure.savefig(folder / name, format="png", dpi=DPI)
    return [folder / name for name in drawn]


def draw_curves(rule: str, grid: Grid, outcomes: Outcomes, k: int):
    """Draw pass@1, pass@k, entropy, gradient norm and response length of all methods with one rule.

    Args:
      rule: the rule.
      grid: the grid of the comparison.
      outcomes: the finished cells.
      k: of pass@k.

    Returns:
      A matplotlib Figure.
    """
    panels = [Panel(f"Held-out pass@{n}", "share solved", (), share=True) for n in (1, k)]
    panels += [Panel(title, unit, ()) for title, unit in CURVES.values()]
    figure, all_axes = panel_axes(len(panels), f"temperature {rule}")
    for color, method in zip(_colors(grid.methods), grid.methods):
        found = [outcomes[key] for seed in grid.seeds if (key := (rule, method, seed)) in outcomes]
        if not found:
            continue
        for axes, n in zip(all_axes, (1, k)):
            share = [np.nanmean(solved(o.passed, o.valid, n), axis=1) for o in found]
            _line(axes, found[0].evaluated, np.array(share), color, method)
        for axes, name in zip(all_axes[2:], CURVES):
            _line(axes, found[0].steps, np.array([o.curves[name] for o in found]), color, method)
    last = max(int(o.evaluated.max()) for o in outcomes.values())
    for axes, panel in zip(all_axes, panels):
        style_axes(axes, panel, 0, last)
        axes.autoscale(axis="y")  # also for fractions, so that close lines can be distinguished
        if axes is not all_axes[0] and axes.get_legend():
            axes.get_legend().remove()
    return figure


def draw_differences(table: dict[str, Json]):
    """Draw the paired differences of mean and final pass@1 and pass@k with their intervals.

    Args:
      table: from `make_table`.

    Returns:
      A matplotlib Figure.
    """
    names = [f"{when} pass@{k}" for when in ("mean", "final") for k in (1, table["samples_per_problem"])]
    rules = [*table["rules"], *([POOLED] if len(table["rules"]) > 1 else [])]
    figure, all_axes = panel_axes(len(names) * len(table["differences"]), "Paired differences, 95% intervals")
    colors, marks = dict(zip(table["methods"], _colors(table["methods"]))), {}
    panels = ((name, other) for other in table["differences"] for name in names)
    for axes, (name, other) in zip(all_axes, panels):
        by_rule = table["differences"][other]
        shown = [m for m in table["methods"] if m != other]
        for row, method in enumerate(shown):
            for column, rule in enumerate(rules):
                if not (of := by_rule[rule][method].get(name)):
                    continue
                y = column + 0.8 * ((row + 0.5) / len(shown) - 0.5)
                points = 100 * np.array([of["low"], of["mean"], of["high"]], float)
                axes.plot(points[[0, 2]], [y, y], color=colors[method], linewidth=1.6)
                (marks[method],) = axes.plot(points[1], y, "o", color=colors[method], markersize=4)
        style_axes(axes, Panel(f"{name}, against {other}", "", ()), 0, 1)
        axes.axvline(0, color="#333333", linewidth=0.8)
        axes.set_xlabel("percentage points", fontsize=8.5)
        # Linear up to 3 points, logarithmic beyond, so that a method that collapses does not hide the others.
        axes.autoscale(axis="x")
        axes.set_xscale("symlog", linthresh=3)
        low, high = axes.get_xlim()
        axes.set_xticks([x for x in _TICKS if low <= x <= high], minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(rules)), rules)
        axes.set_ylim(len(rules) - 0.5, -0.5)  # the first rule on top
    shown = [method for method in table["methods"] if method in marks]
    handles = [marks[method] for method in shown]
    figure.legend(handles, shown, loc="outside lower center", ncols=len(shown), fontsize=9, frameon=False)
    return figure


def _line(axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """Draw the mean of `values` [S, E] over the seeds, and one standard error to either side."""
    mean, S = values.mean(axis=0), len(values)
    axes.plot(steps, mean, color=color, linewidth=1.6, label=label)
    if S > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(S)
        axes.fill_between(steps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)


def _colors(methods) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(methods))]
