"""The Markdown report of a comparison: settings, significant differences, and all numbers with their intervals."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from lpo_jax.compare.grid import Grid
from lpo_jax.compare.table import POOLED, Outcome, Outcomes
from lpo_jax.config import Config
from lpo_jax.reporting.text import duration
from lpo_jax.types import Json

# Titles of the measures in tables. Measures of pass@k are their own titles and are shown in percent.
_NAMES = {
    "mean actor/entropy": "entropy, nats",
    "mean actor/grad_norm": "gradient norm",
    "spread actor/grad_norm": "gradient norm, spread / mean",
    "mean response_length/mean": "response, tokens",
}


def render_report(
    config: Config, grid: Grid, outcomes: Outcomes, table: dict[str, Json], figures: Sequence[Path]
) -> str:
    """Render the content of `report.md`.

    Args:
      config: the config of the comparison.
      grid: its grid.
      outcomes: the finished cells.
      table: from `make_table`.
      figures: paths of the PNG files, in the directory of the report.
    """
    parts = [
        "# Comparison of methods",
        _what_was_run(config, grid, outcomes, table),
        "## Significant differences",
        _how_to_read(table),
        *(_statements(table, other) for other in table["differences"]),
        "## Scores",
        "Mean over seeds and problems, in percent for pass@k, with the 95% interval in parentheses. *final* is after "
        "the last step, *mean* is over all evaluations except the one before training.",
        *(_scores(table, rule) for rule in table["rules"] if any(table["scores"][rule].values())),
        "## Paired differences",
        "In percentage points for pass@k and in the measure's unit otherwise, with the 95% interval in parentheses; "
        "after the bar, the number of pairs of runs with a difference above 0. **Bold**: the interval excludes 0. "
        f"The rule *{POOLED}* is the mean over the rules of each seed.",
        *(_differences(table, other) for other in table["differences"]),
        "## Curves",
        *(f"![{path.stem}]({path.name})" for path in figures),
        "## Runs",
        _runs(config, grid, outcomes),
        "## Machine",
        _machine(outcomes),
    ]
    return "\n\n".join(parts) + "\n"


def _what_was_run(config: Config, grid: Grid, outcomes: Outcomes, table: dict[str, Json]) -> str:
    training, sampling, k = config.training, config.sampling, table["samples_per_problem"]
    start = {name: _share(of) for name, of in table["start"].items()}
    warm = (
        f"One supervised warm start ({config.warm_start.steps} updates of {config.warm_start.batch_size} examples) is "
        "the common start of all runs: "
        if config.warm_start.steps
        else f"All runs start from {config.model.path}: "
    )
    missing = (
        f"\n\n**{len(table['missing'])} cells are missing** (their runs failed): {', '.join(table['missing'])}."
        if table["missing"]
        else ""
    )
    counts = (
        _several(len(grid.rules), "temperature rule"),
        _several(len(grid.methods), "method"),
        _several(len(grid.seeds), "seed"),
    )
    return (
        f"{' x '.join(counts)} = {_several(len(grid.cells), 'run')} of task {config.task['name']}. {warm}"
        f"pass@1 is {start['pass@1']} and pass@{k} is {start[f'pass@{k}']} on the held-out problems.\n\n"
        f"Each run: {training.steps} steps of {training.prompts_per_step} prompts x {sampling.num_responses} responses "
        f"of at most {sampling.max_tokens} tokens, {training.updates_per_step} updates per step, learning rate "
        f"{config.optimizer.learning_rate:g}; held-out evaluation on {table['problems']} problems x {k} samples at "
        f"temperature {config.evaluation.temperature:g} after steps {', '.join(map(str, table['evaluated_after']))}. "
        "Runs with the same seed draw the same prompts and random numbers. Runs with the same rule have the same "
        "target, because the rule is the temperature by which a policy gradient divides its advantage and a listwise "
        f"method its rewards.\n\n{_methods(config)}{missing}"
    )


def _methods(config: Config) -> str:
    from lpo_jax import objectives
    from lpo_jax.compare.grid import read_method_spec

    known = objectives.names()
    rows = []
    for spec in config.compare.methods:
        method = read_method_spec(spec)
        options = {k: v for k, v in method.objective.items() if k != "name"}
        name = method.objective["name"] + (f" {options}" if options else "")
        rows.append((method.label, f"`{name}`", known[method.objective["name"]]["formula"]))
    return _markdown(("label", "method", "formula, with the rule's temperature"), rows)


def _how_to_read(table: dict[str, Json]) -> str:
    if len(table["seeds"]) < 2:
        return "With one seed there are no intervals, so no difference can be distinguished from chance."
    return (
        "Differences are paired by seed and problem. Intervals are over seeds and problems. This section lists only "
        f"differences whose 95% interval excludes 0. If no method differed from any other, up to one in twenty of the "
        f"{_intervals(table)} intervals below would exclude 0 by chance."
    )


def _statements(table: dict[str, Json], other: str) -> str:
    lines, significant, total = [], 0, 0
    for rule, by_method in table["differences"][other].items():
        for method, by_name in by_method.items():
            sure = {name: of for name, of in by_name.items() if _certain(of)}
            significant, total = significant + len(sure), total + len(by_name)
            where = "over all rules" if rule == POOLED else f"under {rule}"
            if sure:
                changes = ", ".join(f"{_title(name)} {_change(of, name)}" for name, of in sure.items())
                lines.append(f"- {where}, {method}: {changes}")
    rest = f"{total - significant} of {total} differences from {other} are not significant."
    return f"Against **{other}**, in percentage points of pass@k or the measure's unit:\n\n" + "\n".join(
        [*lines, f"- {rest}"]
    )


def _scores(table: dict[str, Json], rule: str) -> str:
    by_method = {m: of for m, of in table["scores"][rule].items() if of}
    names = list(next(iter(by_method.values()), ()))
    rows = [
        (method, *(_share(of[name]) if _is_share(name) else _plain(of[name]) for name in names))
        for method, of in by_method.items()
    ]
    return f"### {rule}\n\n" + _markdown(("method", *map(_title, names)), rows)


def _differences(table: dict[str, Json], other: str) -> str:
    by_rule = table["differences"][other]
    names = list(next((of for by_method in by_rule.values() for of in by_method.values() if of), ()))
    rows = [
        (rule, method, *(_difference(by_name[name], name) for name in names))
        for rule, by_method in by_rule.items()
        for method, by_name in by_method.items()
        if by_name
    ]
    return f"### Against {other}\n\n" + _markdown(("rule", "method", *map(_title, names)), rows)


def _runs(config: Config, grid: Grid, outcomes: Outcomes) -> str:
    """Links to the report of each finished cell, relative to the directory of this report."""
    rows = []
    for cell in grid.cells:
        if (cell.rule, cell.method, cell.seed) in outcomes:
            path = Path(cell.config.output, "report.html").relative_to(config.output)
            rows.append((cell.rule, cell.method, str(cell.seed), f"[{cell.name}]({path.as_posix()})"))
    return _markdown(("rule", "method", "seed", "report"), rows)


def comparison_table(table: dict[str, Json]) -> Table:
    """Return the scores of pass@k of all methods for the terminal, with their 95% intervals."""
    scores = {(rule, method): of for rule, by in table["scores"].items() for method, of in by.items() if of}
    names = [name for name in next(iter(scores.values()), ()) if _is_share(name)]
    shown = Table(
        title=Text("Held-out scores, mean over seeds and problems (95% interval)", "bold"),
        box=box.SIMPLE_HEAD,
    )
    for name in ("rule", "method"):
        shown.add_column(name)
    for name in names:
        shown.add_column(Text(_title(name)), justify="right")
    for (rule, method), of in scores.items():
        shown.add_row(Text(rule), Text(method), *(Text(_share(of[name])) for name in names))
    return shown


def _machine(outcomes: Outcomes) -> str:
    found = list(outcomes.values())
    seconds = sorted(outcome.seconds for outcome in found)
    kinds = list(dict.fromkeys(_surroundings(outcome) for outcome in found))
    return (
        f"{len(found)} runs, {duration(sum(seconds))} of training and evaluation in total (median "
        f"{seconds[len(seconds) // 2]:.0f} s, minimum {seconds[0]:.0f} s, maximum {seconds[-1]:.0f} s per run), "
        "without start-up and compilation.\n\n" + "\n".join(f"- {kind}" for kind in kinds)
    )


def _surroundings(outcome: Outcome) -> str:
    about = outcome.surroundings
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{', '.join(dict.fromkeys(about['devices']))}; Python {about['python']}; {versions}"


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _certain(of: dict[str, float]) -> bool:
    return of["low"] > 0 or of["high"] < 0


def _is_share(name: str) -> bool:
    return "pass@" in name


def _title(name: str) -> str:
    return _NAMES.get(name, name)


def _share(of: dict[str, float]) -> str:
    return f"{100 * of['mean']:.1f}% ({_interval(of, 100)})"


def _plain(of: dict[str, float]) -> str:
    return f"{of['mean']:.3f} ({_interval(of, 1)})"


def _difference(of: dict[str, float], name: str) -> str:
    change = f"**{_change(of, name)}**" if _certain(of) else _change(of, name)
    return f"{change} \\| {of['wins']}/{of['pairs']}"


def _change(of: dict[str, float], name: str) -> str:
    scale, digits = (100, 1) if _is_share(name) else (1, 3)
    return f"{scale * of['mean']:+.{digits}f} ({_interval(of, scale)})"


def _interval(of: dict[str, float], scale: float) -> str:
    if math.isnan(of["low"]):
        return "no interval"
    digits = 1 if scale == 100 else 3
    return f"{scale * of['low']:.{digits}f} to {scale * of['high']:.{digits}f}"


def _intervals(table: dict[str, Json]) -> int:
    return sum(
        len(by_name)
        for by_rule in table["differences"].values()
        for by_method in by_rule.values()
        for by_name in by_method.values()
    )


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
