"""Learning curves of a run as PNG files, drawn from its `metrics.jsonl`.

Figures are created with `matplotlib.figure.Figure`, not with pyplot, so that no global state changes and no
display is needed. Panels without data are omitted.
"""

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lpo_jax.files import write_file
from lpo_jax.reporting.writers import read_metrics

COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)  # Okabe and Ito's palette, suitable for colour-blind readers
_INK, _GRID = "#333333", "#E6E6E6"
_SMOOTH_FROM = 20  # number of points from which curves are smoothed
_WINDOW = 10  # of the moving average, in points


@dataclass(frozen=True)
class Panel:
    """One chart of a figure.

    Attributes:
        title: title of the chart.
        unit: label of the y axis.
        lines: (metric, label) pairs.
        band: metrics between which the area is shaded: lower, upper.
        share: whether the values are fractions, shown in percent on an axis that starts at 0.
        log: whether the y axis is logarithmic, if all values are positive.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    band: tuple[str, str] | None = None
    share: bool = False
    log: bool = False


LEARNING = (
    Panel("Reward", "mean per response", (("critic/rewards/mean", "reward"),)),
    Panel("Pass rate on training prompts", "share of responses", (("reward/pass_rate", "pass"),), share=True),
    Panel("Supervised loss", "nats per token", (("train/loss", "training"),)),
    Panel("Entropy of the policy", "nats per token", (("actor/entropy", "entropy"),)),
    Panel(
        "Response length",
        "tokens (band: shortest to longest)",
        (("response_length/mean", "mean"),),
        band=("response_length/min", "response_length/max"),
    ),
    Panel("Gradient norm", "before clipping", (("actor/grad_norm", "RL"), ("train/grad_norm", "supervised"))),
    Panel(
        "Responses cut at the length limit",
        "share of responses",
        (("response_length/clip_ratio", "cut"),),
        share=True,
    ),
    Panel(
        "Distance on the simplex",
        "total variation from uniform",
        (("lpo/target_tv", "target w*"), ("lpo/policy_tv", "policy P")),
    ),
    Panel(
        "Prompts and responses without signal",
        "share",
        (
            ("lpo/degenerate_group_frac", "prompts, rewards all equal"),
            ("lpo/masked_response_frac", "responses masked"),
        ),
        share=True,
    ),
)
DIAGNOSTICS = (
    Panel(
        "Coefficients",
        "sum of |c| per prompt",
        (("lpo/coef_l1", "coefficients"),),
    ),
    Panel("Largest score", "nats, |log-ratio|", (("lpo/score_abs_max", "score"),)),
    Panel("Divergence", "nats", (("lpo/forward_kl", "KL(w* || P)"), ("lpo/reverse_kl", "KL(P || w*)"))),
    Panel("Temperature of the target", "reward units", (("lpo/temperature_mean", "tau"),)),
    Panel(
        "Log-prob gap, sampling to training",
        "nats per token",
        (("lpo/logp_gap_max", "max"), ("lpo/logp_gap_mean", "mean")),
        log=True,
    ),
    Panel("Throughput", "tokens per second and device", (("perf/throughput", "throughput"),)),
)


def save_plots(run_dir: str | os.PathLike, title: str | None = None) -> list[Path]:
    """Draw `plots/learning_curves.png` and, if the run has such metrics, `plots/diagnostics.png`.

    Args:
        run_dir: a run directory with a `metrics.jsonl`.
        title: title of the figures; the directory's name if None.

    Returns:
        The paths of the files.

    Raises:
        UserError: `metrics.jsonl` is missing or damaged, or a file cannot be written.
    """
    rows = read_metrics(run_dir)
    title = Path(run_dir).resolve().name if title is None else title
    folder = Path(run_dir) / "plots"
    figures = {"learning_curves": learning_curves(rows, title), "diagnostics": diagnostics(rows, title)}
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            png = io.BytesIO()  # matplotlib does not write files atomically
            figure.savefig(png, format="png", dpi=150)
            paths.append(folder / f"{name}.png")
            write_file(paths[-1], png.getvalue())
    return paths


def learning_curves(rows: Sequence[dict], title: str = ""):
    """Draw held-out scores, reward, pass rate, entropy, lengths, gradient norm and distances on the simplex.

    Args:
        rows: the rows of `metrics.jsonl`.
        title: title of the figure.

    Returns:
        A matplotlib Figure, or None if `rows` has none of these metrics.
    """
    return _figure(rows, heldout_panels(rows) + list(LEARNING), title)


def diagnostics(rows: Sequence[dict], title: str = ""):
    """Draw coefficients, scores, divergences, temperature, log-prob gap and throughput.

    Args:
        rows: the rows of `metrics.jsonl`.
        title: title of the figure.

    Returns:
        A matplotlib Figure, or None if `rows` has none of these metrics.
    """
    return _figure(rows, list(DIAGNOSTICS), f"{title}: diagnostics" if title else "")


def heldout_panels(rows: Sequence[Mapping]) -> list[Panel]:
    """Return one panel of pass@k for each held-out data set that occurs in the rows."""
    names = {name for row in rows for name in row}
    found = [re.fullmatch(r"val-core/(.+)/acc/pass@(\d+)", name) for name in names]
    data_sets = sorted({match[1] for match in found if match})
    return [
        Panel(
            f"Held-out {data}",
            "share solved, 95% interval",
            tuple(
                (f"val-core/{data}/acc/pass@{k}", f"pass@{k}")
                for k in sorted(int(match[2]) for match in found if match and match[1] == data)
            ),
            share=True,
        )
        for data in data_sets
    ]


def _figure(rows: Sequence[dict], panels: list[Panel], title: str):
    panels = [panel for panel in panels if any(name in row for name, _ in panel.lines for row in rows)]
    if not panels:
        return None
    figure, all_axes = panel_axes(len(panels), title)
    steps = [row["step"] for row in rows]
    for axes, panel in zip(all_axes, panels):
        smoothed = _draw(axes, rows, panel)
        style_axes(axes, panel, min(steps), max(steps), smoothed)
    return figure


def panel_axes(panels: int, title: str = ""):
    """Create a Figure and the axes of its panels, in row-major order."""
    from matplotlib.figure import Figure

    columns = min(panels, 2 if panels in (2, 4) else 3)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(4.4 * columns, 3.0 * lines + 0.5), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)  # type: ignore[call-arg]
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold", color=_INK, x=0.015, ha="left")
    return figure, [figure.add_subplot(lines, columns, index + 1) for index in range(panels)]


def _draw(axes, rows: Sequence[dict], panel: Panel) -> bool:
    """Draw the lines of a panel and return whether a moving average was drawn over the raw values."""
    smoothed = False
    if panel.band:
        _shade(axes, rows, *panel.band, COLORS[0])
    for color, (name, label) in zip(COLORS, panel.lines):
        steps, values = _series(rows, name)
        if not steps:
            continue
        held_out = name.startswith("val-core/")
        marker = "o" if held_out or len(steps) < _SMOOTH_FROM else None
        if held_out:
            interval = name.replace("val-core/", "val-aux/", 1)
            _shade(axes, rows, f"{interval}/ci_low", f"{interval}/ci_high", color)
        if len(steps) >= _SMOOTH_FROM and not held_out:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.9)
            values, smoothed = _trailing_mean(values), True
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=label)
    _mark_nonfinite(axes, rows, panel)
    return smoothed


def _mark_nonfinite(axes, rows: Sequence[dict], panel: Panel) -> None:
    names = {name for name, _ in panel.lines}
    steps = [row["step"] for row in rows if names & row.get("nonfinite", {}).keys()]
    if steps:
        axes.plot(
            steps,
            [0.02] * len(steps),
            "x",
            color="#C00000",
            markersize=5,
            label="not finite",
            transform=axes.get_xaxis_transform(),
        )


def _shade(axes, rows: Sequence[dict], low_name: str, high_name: str, color: str) -> None:
    low, high = dict(zip(*_series(rows, low_name))), dict(zip(*_series(rows, high_name)))
    steps = sorted(low.keys() & high.keys())
    bounds = [low[step] for step in steps], [high[step] for step in steps]
    axes.fill_between(steps, *bounds, color=color, alpha=0.14, linewidth=0)
    if len(steps) <= 3:  # a band over one step has no width, so draw whiskers
        axes.vlines(steps, *bounds, color=color, alpha=0.5, linewidth=1)


def style_axes(axes, panel: Panel, first: int, last: int, smoothed: bool = False) -> None:
    """Set title, labels, limits and legend of a panel after its lines have been drawn.

    Args:
        axes: the matplotlib axes of the panel.
        panel: the panel.
        first: the first step of the x axis.
        last: the last step of the x axis.
        smoothed: whether the axis label should mention the moving average.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, fontsize=10.5, color=_INK, loc="left", fontweight="bold")
    axes.set_ylabel(panel.unit, fontsize=8.5, color=_INK)
    note = f"training step (bold: mean of {_WINDOW})" if smoothed else "training step"
    axes.set_xlabel(note, fontsize=8.5, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    margin = max(0.03 * (last - first), 0.5)
    axes.set_xlim(first - margin, last + margin)  # the same for all panels; not empty for a single step
    if panel.share:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        top = min(max(axes.get_ylim()[1], 0.05), 1.02)
        axes.set_ylim(-0.02 * top, top)  # starts below 0 so that a line at 0 is visible
    if panel.log and axes.dataLim.minposy < math.inf and axes.dataLim.y0 > 0:
        axes.set_yscale("log")
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8, colors=_INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#AAAAAA")
    if sum(not line.get_label().startswith("_") for line in axes.get_lines()) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=_INK)


def _series(rows: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric without missing values. If a step has several rows, the last one counts."""
    points = {row["step"]: row[name] for row in rows if row.get(name) is not None}
    return list(points), list(points.values())


def _trailing_mean(values: Sequence[float]) -> list[float]:
    return [sum(values[max(0, i + 1 - _WINDOW) : i + 1]) / min(i + 1, _WINDOW) for i in range(len(values))]
