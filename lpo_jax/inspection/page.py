"""The report of one or two runs: one HTML file that needs neither a server nor the network.

The script of plotly is embedded, and so are the texts, compressed. Whatever a model, a data set or a config wrote
reaches the page as text: Jinja escapes it, the page's own script sets `textContent` only, and the page's
Content-Security-Policy allows no script but the embedded ones, by their hashes.
"""

import base64
import datetime
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from lpo_jax import __version__
from lpo_jax.config import Config
from lpo_jax.errors import UserError
from lpo_jax.files import write_file
from lpo_jax.inspection.charts import charts
from lpo_jax.inspection.diff import RunDifference, compare_runs
from lpo_jax.inspection.digest import Digest, digest
from lpo_jax.inspection.images import embedded_thumbnails
from lpo_jax.inspection.load import Run, finite_number, flatten, read_run, status
from lpo_jax.inspection.verdict import judge
from lpo_jax.reporting.doctor import diagnose
from lpo_jax.reporting.text import sanitise
from lpo_jax.types import Json

BUDGET = 10_000_000  # bytes of compressed texts in one report
IMAGE_BUDGET = 5_000_000  # bytes of thumbnails in one report
MOST_RUNS = 6
_SECTIONS = {
    "learning": "Learning",
    "groups": "Groups",
    "update": "The update",
    "health": "Health",
    "sampler": "Sampler and trainer",
    "time": "Time",
}
_COLUMNS = {
    "reward": "critic/score/mean",
    "pass": "reward/pass_rate",
    "tokens": "response_length/mean",
    "cut": "response_length/clip_ratio",
    "entropy": "actor/entropy",
    "gradient": "actor/grad_norm",
    "gap": "lpo/logp_gap_max",
}
_SHARES = ("pass", "cut")
_SCRIPTS = ("dom.js", "charts.js", "groups.js", "views.js", "main.js")


def save_report(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
) -> Path:
    """Write the report of some runs.

    Args:
        paths: the run directories, one or several.
        out: the HTML file; `report.html` in the first directory if None.

    Returns:
        The path of the file.

    Raises:
        UserError: a path is no run, there are too many, or the file cannot be written.
    """
    runs = [read_run(path) for path in paths]
    target = Path(out) if out is not None else runs[0].path / "report.html"
    if target.is_dir():
        raise UserError(f"--out: {target} is a directory; name a file, such as {target / 'report.html'}")
    write_file(target, render(runs))
    return target


class TimedReport:
    """Writes the report of a run that goes on, so rarely that it takes at most 2% of the time."""

    _SHARE = 0.02

    def __init__(self):
        self._ended, self._seconds = time.monotonic(), 0.5

    def due(self) -> bool:
        """Whether enough time has passed since the last report."""
        return self._seconds <= self._SHARE * (time.monotonic() - self._ended)

    def write(self, run: Path) -> Path:
        """Write the report now, and return its path; raises as `save_report`."""
        started = time.monotonic()
        path = save_report([run])
        self._ended = time.monotonic()
        self._seconds = self._ended - started
        return path


def render(runs: Sequence[Run], live: bool = False) -> str:
    """Return the HTML of a report.

    Args:
        runs: the runs.
        live: whether `lpo watch` serves the page, so that it looks for new steps.

    Raises:
        UserError: there are too many runs for one page.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(f"a report shows at most {MOST_RUNS} runs, got {len(runs)}; lpo compare is for many")
    digests = [digest(run, BUDGET // len(runs)) for run in runs]
    pictures = []
    for run, found in zip(runs, digests):
        uris, notes = embedded_thumbnails(run, found.images, IMAGE_BUDGET // len(runs))
        pictures.append(uris)
        found.notes += notes
    names = _names(runs)
    differences = compare_runs(runs[0], runs[1]) if len(runs) == 2 else None
    scripts = [_plotly(), "\n".join(_asset(name) for name in _SCRIPTS)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lpo_jax.inspection"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        policy=_policy(scripts, live),
        css=Markup(_asset("report.css")),
        scripts=[Markup(script) for script in scripts],
        data=_embedded(_data(runs, names, digests, pictures, differences, live)),
        chunks=[
            (f"chunk-{index}-{of.step}", of.chunk)
            for index, digest in enumerate(digests)
            for of in digest.steps
        ],
        runs=[_run_context(run, name, of) for run, name, of in zip(runs, names, digests)],
        differences=differences,
        sections=_SECTIONS,
        title=" and ".join(names),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )


def _data(
    runs: Sequence[Run],
    names: Sequence[str],
    digests: Sequence[Digest],
    pictures: Sequence[Mapping[str, str]],
    differences: RunDifference | None,
    live: bool,
) -> dict[str, Json]:
    return {
        "runs": [
            {
                "name": name,
                "steps": [of.step for of in found.steps],
                "kept": [of.kept for of in found.steps],
                "groups": [of.groups for of in found.steps],
                "prompts": found.prompts,
                "last": run.last_step,
                "images": uris,
            }
            for run, name, found, uris in zip(runs, names, digests, pictures)
        ],
        "charts": charts(runs, digests),
        "first": _first(differences),
        "live": live,
    }


def _first(differences: RunDifference | None) -> dict[str, Json] | None:
    if differences is None or differences.response is None:
        return None
    of = differences.response
    return {"step": of.step, "common": sanitise(of.common), "rest": [sanitise(text) for text in of.rest]}


def _run_context(run: Run, name: str, found: Digest) -> dict[str, Json]:
    """What the template shows of one run."""
    return {
        "name": name,
        "path": sanitise(str(run.path)),
        "status": status(run),
        "progress": f"step {run.last_step}" + (f" of {run.total_steps}" if run.total_steps else ""),
        "verdict": judge(run),
        "diagnoses": diagnose(run.metrics),
        "notes": [sanitise(note) for note in (*run.missing, *found.notes)],
        "table": _table(run, found),
        "facts": _facts(run),
        "config": _changed(run),
        "failures": sorted(found.failures.items(), key=lambda item: -item[1]),
        "unequal": found.unequal,
        "short": found.short,
        "worst_tokens": found.worst_tokens,
        "prompts": _first_solves(found),
    }


def _table(run: Run, found: Digest) -> list[dict[str, Json]]:
    """One row for each step with rollouts: its metrics, and its groups by outcome."""
    metrics: dict[int, dict[str, Json]] = {}
    for row in run.metrics:
        metrics.setdefault(row["step"], {}).update(row)
    rows = []
    for of in found.steps:
        row = metrics.get(of.step, {})
        cells = {label: _cell(label, finite_number(row.get(name))) for label, name in _COLUMNS.items()}
        shares = [round(100 * part / max(of.groups, 1), 1) for part in (of.fail, of.mixed, of.solved)]
        rows.append(
            {"step": of.step, "cells": cells, "shares": shares, "counts": [of.fail, of.mixed, of.solved]}
        )
    return rows


def _cell(label: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if label in _SHARES else f"{value:.3g}"


def _first_solves(found: Digest) -> dict[str, Json]:
    """How many of the kept prompts were solved, and when first."""
    firsts = {
        prompt: next((step for step, passed, _ in groups if passed), None)
        for prompt, groups in found.prompts.items()
    }
    repeated = sorted(
        (prompt for prompt, groups in found.prompts.items() if len(groups) > 1),
        key=lambda prompt: -len(found.prompts[prompt]),
    )
    return {
        "seen": len(firsts),
        "solved": sum(step is not None for step in firsts.values()),
        "repeated": len(repeated),
        "shown": [
            {"id": prompt, "first": firsts[prompt], "groups": found.prompts[prompt]}
            for prompt in (repeated or list(found.prompts))[:40]
        ],
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    about = run.about
    versions = about.get("versions") if isinstance(about.get("versions"), dict) else {}
    devices = about.get("devices") if isinstance(about.get("devices"), list) else []
    data = about.get("data") if isinstance(about.get("data"), dict) else {}
    sizes = [run.config.get(key) for key in ("training.prompts_per_step", "sampling.num_responses")]
    facts = {
        "model": run.config.get("model.path"),
        "task": run.config.get("task.name"),
        "method": run.config.get("objective.name"),
        "steps": run.total_steps,
        "prompts x responses": " x ".join(map(str, sizes)) if None not in sizes else None,
        "devices": ", ".join(dict.fromkeys(map(str, devices))),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "data": str(data.get("content_hash", ""))[:16],
    }
    return [(name, sanitise(str(value))) for name, value in facts.items() if value not in (None, "")]


def _changed(run: Run) -> list[tuple[str, str, str]]:
    """The settings that differ from the defaults: (key, value, default)."""
    defaults = flatten(Config().to_dict())
    # A task or a method has keys of its own, which have no default here.
    return [
        (sanitise(key), sanitise(str(value)), sanitise(str(defaults[key])) if key in defaults else "")
        for key, value in sorted(run.config.items())
        if key not in defaults or defaults[key] != value
    ]


def _names(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart: the directories' names, with parents where two are equal."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({i})" for i, name in enumerate(names, 1)]
    return [sanitise(name) for name in names]


def _embedded(value: Json) -> Markup:
    """JSON that may stand inside of a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _policy(scripts: Sequence[str], live: bool) -> str:
    """The Content-Security-Policy: only the embedded scripts run, and nothing is fetched."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    source = "self" if live else "none"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        f"connect-src '{source}'; base-uri 'none'; form-action 'none'"
    )


def _asset(name: str) -> str:
    return (files("lpo_jax.inspection") / "templates" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
