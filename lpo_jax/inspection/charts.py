"""The charts of a report as plain data: what they show, of which run, and the sections they belong to."""

import re
from collections.abc import Mapping, Sequence

from lpo_jax.inspection.digest import Digest, histogram
from lpo_jax.inspection.load import Run, finite_number
from lpo_jax.reporting.plots import DIAGNOSTICS, LEARNING, Panel, heldout_panels
from lpo_jax.types import Json

Chart = dict[str, Json]

_HEALTH = (
    "Entropy of the policy",
    "Response length",
    "Gradient norm",
    "Responses cut at the length limit",
    "Prompts and responses without signal",
    "Repetition",
)
_SAMPLER = ("Log-prob gap, sampling to training",)
_TIME = ("Throughput",)
_BANDS = ("gen", "reward", "old_log_prob", "update_actor")
_FLOOR = re.compile(r"perf/.*(floor|mfu|roofline).*")
_SCORE = re.compile(r"val-core/(.+)/score/mean@\d+")
_PARTS = re.compile(r"reward/parts/(.+)")


def charts(runs: Sequence[Run], digests: Sequence[Digest]) -> list[Chart]:
    """Return all charts that have data, in the order of the page."""
    rows = [row for run in runs for row in run.metrics]
    panels = heldout_panels(rows) + list(LEARNING) + list(DIAGNOSTICS) + _own_panels(rows)
    found = [_panel(panel, runs) for panel in panels]
    found += [_groups(i, run, of) for i, (run, of) in enumerate(zip(runs, digests))]
    found += [_histogram(i, run, of) for i, (run, of) in enumerate(zip(runs, digests))]
    found += [_bands(i, run) for i, run in enumerate(runs)]
    found = [chart for chart in found if chart["series"]]
    return [chart | {"id": f"chart-{index}"} for index, chart in enumerate(found)]


def _own_panels(rows: Sequence[Mapping]) -> list[Panel]:
    names = sorted({name for row in rows for name in row})
    parts = tuple((name, match[1]) for name in names if (match := _PARTS.fullmatch(name)))
    floors = tuple((name, name.removeprefix("perf/")) for name in names if _FLOOR.fullmatch(name))
    # Where the score is the pass rate, it is already a curve.
    scores = tuple((name, match[1]) for name in names if (match := _SCORE.fullmatch(name)))
    advantages = tuple((f"critic/advantages/{of}", of) for of in ("mean", "min", "max"))
    own = (
        Panel("Parts of the reward", "mean per response", parts),
        Panel("Share of the floor", "achieved / possible", floors, share=True),
        Panel(
            "Repetition",
            "repeated sequences of four tokens",
            (("response/repetition", "repeated"),),
            share=True,
        ),
        Panel("Held-out score", "evaluation.score", scores),
        Panel("Advantages", "after shaping", advantages),
    )
    return [panel for panel in own if panel.lines]


def _panel(panel: Panel, runs: Sequence[Run]) -> Chart:
    series = []
    for index, run in enumerate(runs):
        for name, label in panel.lines:
            points = _points(run, name)
            if not points:
                continue
            held = name.startswith("val-core/")
            around = name.replace("val-core/", "val-aux/", 1) if held else ""
            low, high = (f"{around}/ci_low", f"{around}/ci_high") if held else panel.band or ("", "")
            lows, highs = _points(run, low), _points(run, high)
            series.append(
                {
                    "run": index,
                    "name": label,
                    "x": list(points),
                    "y": list(points.values()),
                    "low": [lows.get(step) for step in points] if lows and highs else None,
                    "high": [highs.get(step) for step in points] if lows and highs else None,
                    "markers": held or len(points) <= 30,
                }
            )
    return _chart(panel.title, panel.unit, "line", series, share=panel.share, log=panel.log)


def _groups(index: int, run: Run, digest: Digest) -> Chart:
    names = {"fail": "all fail", "mixed": "mixed", "solved": "all pass"}
    steps = [of for of in digest.steps if of.groups]
    series = [
        {
            "run": index,
            "name": label,
            "x": [of.step for of in steps],
            "y": [getattr(of, name) / of.groups for of in steps],
            "tone": name,
        }
        for name, label in names.items()
        if steps
    ]
    return _chart(
        "Groups: all fail, mixed, all pass", "share of groups", "area", series, share=True, of=run.name
    )


def _histogram(index: int, run: Run, digest: Digest) -> Chart:
    of = histogram(digest)
    series = [
        {
            "run": index,
            "name": f"step{'s' * (span[0] != span[1])} {'-'.join(map(str, dict.fromkeys(span)))}",
            "x": of["centres"],
            "y": of["shares"][part],
        }
        for part, span in (of.get("steps") or {}).items()
    ]
    return _chart(
        "Rewards, first and last quarter", "share of responses", "bar", series, share=True, of=run.name
    )


def _bands(index: int, run: Run) -> Chart:
    labels = ("sampling", "verifying", "scoring", "updates")
    series: list[Json] = []
    for name, label in zip(_BANDS, labels):
        points = _points(run, f"timing_s/{name}")
        if points and max(points.values()) > 0:
            series.append({"run": index, "name": label, "x": list(points), "y": list(points.values())})
    return _chart("Time of a step", "seconds", "area", series, of=run.name)


def _chart(title: str, unit: str, kind: str, series: list, *, share=False, log=False, of: str = "") -> Chart:
    section = (
        "health"
        if title in _HEALTH
        else "sampler"
        if title in _SAMPLER
        else "time"
        if title in (*_TIME, "Time of a step", "Share of the floor")
        else "groups"
        if kind in ("area", "bar")
        else "update"
        if title in {panel.title for panel in DIAGNOSTICS} | {"Distance on the simplex", "Advantages"}
        else "learning"
    )
    return {"title": title, "unit": unit, "kind": kind, "section": section, "share": share, "log": log, "of": of,
            "series": series}  # fmt: skip


def _points(run: Run, name: str) -> dict[int, float]:
    """Steps and values of one metric; the last row of a step counts."""
    return {row["step"]: value for row in run.metrics if (value := finite_number(row.get(name))) is not None}
