"""A run in the terminal: its verdict and steps, the responses of a selection, and the page of one group.

Each function returns a rich renderable. Whatever a model wrote is escaped.
"""

from collections.abc import Iterable, Sequence

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lpo_jax.inspection.diff import RunDifference
from lpo_jax.inspection.images import image_references, thumbnail_file
from lpo_jax.inspection.load import Row, Run, finite_number, groups_of, read_samples, status
from lpo_jax.inspection.verdict import judge
from lpo_jax.reporting.doctor import diagnose
from lpo_jax.reporting.text import sanitise

OUTCOME_STYLES = {"pass": "green", "wrong": "red", "malformed": "yellow"}  # verifier failures: magenta
_VERDICT_STYLES = {"better": "bold green", "worse": "bold red", "unclear": "bold yellow", "unknown": "bold"}
_COLUMNS = {
    "reward": "critic/score/mean",
    "pass": "reward/pass_rate",
    "no signal": "lpo/degenerate_group_frac",
    "cut": "response_length/clip_ratio",
    "tokens": "response_length/mean",
    "entropy": "actor/entropy",
    "gradient": "actor/grad_norm",
}
_SHARES = ("pass", "no signal", "cut")
_BAR = 12  # characters of the longest bar
_CARD = 52  # columns of one response beside others
_MOST_STEPS = 24
_MOST_CHARACTERS = 1500


def run_summary(run: Run) -> Group:
    """Return the verdict on a run, its diagnoses, a table of its steps, and what its directory lacks."""
    verdict = judge(run)
    progress = f"step {run.last_step}" + (f" of {run.total_steps}" if run.total_steps else "")
    parts: list[RenderableType] = [
        Text.assemble((sanitise(str(run.path)), "bold"), f"  {status(run)}, {progress}"),
        Text(sanitise(verdict.sentence), _VERDICT_STYLES[verdict.kind]),
    ]
    for diagnosis in diagnose(run.metrics):
        steps = f" (steps {', '.join(map(str, diagnosis.steps[:8]))})" if diagnosis.steps else ""
        text = (
            (f"{diagnosis.name}: ", "bold red"),
            f"{diagnosis.evidence}{steps}. ",
            (diagnosis.remedy, "bold"),
        )
        parts.append(Text.assemble(*text))
    if run.metrics:
        parts.append(_step_table(run))
    parts += [Text(f"missing: {sanitise(note)}", "dim") for note in run.missing]
    return Group(*parts)


def step_groups(run: Run, step: int, limit: int) -> Group:
    """Return a table of the groups of a step, those with the greatest |c| first."""
    rows, notes = read_samples(run.rollouts[step])
    table = _table(f"Step {step}: groups")
    for name in ("prompt", "passed", "reward", "largest |c|", "tokens"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    table.add_column("end of the prompt", style="dim")
    groups = sorted(groups_of(rows), key=lambda group: -_largest(group))
    for group in groups[:limit]:
        passed = sum(row.get("outcome") == "pass" for row in group)
        table.add_row(
            Text(sanitise(str(group[0].get("id")))),
            Text(
                f"{passed}/{len(group)}",
                "red" if not passed else "green" if passed == len(group) else "yellow",
            ),
            _show(_mean(group, "score")),
            _show(_largest(group)),
            _show(_mean(group, "tokens")),
            Text(" ".join(sanitise(str(group[0].get("input", "")))[-60:].split())),
        )
    if len(groups) > limit:
        notes = [*notes, f"{len(groups) - limit} more groups; --limit shows more."]
    return Group(table, *(Text(note, "dim") for note in notes))


def group_page(run: Run, step: int, group: Sequence[Row]) -> Group:
    """Return the page of a group: its prompt, each response's reward, w*, P and c, and the texts side by side."""
    first = group[0]
    parts: list[RenderableType] = [Text(f"Step {step}, prompt {sanitise(str(first.get('id')))}", "bold")]
    parts.append(_framed("prompt", str(first.get("input", "")), "dim"))
    for name, caption in image_references(first):
        file = thumbnail_file(run, name)
        parts.append(Text.assemble("image  ", (caption, "bold"), f"  {sanitise(str(file))}" if file else ""))
    if first.get("gts") is not None:
        parts.append(Text.assemble("gold answer  ", (sanitise(str(first["gts"])), "bold")))
    table = _table("Why each response was pushed")
    for name in ("k", "outcome", "reward", "w*", "", "P", "", "c", ""):
        table.add_column(name, justify="right" if name in ("k", "reward", "w*", "P", "c") else "left")
    largest = {
        key: max((abs(finite_number(row.get(key)) or 0.0) for row in group), default=0.0) for key in _PUSH
    }
    for row in group:
        c = finite_number(row.get("coefficient"))
        arrow = "" if not c else " up" if c < 0 else " down"
        cells: list[RenderableType] = [
            str(row.get("k", "?")),
            _outcome(row),
            _show(finite_number(row.get("score"))),
        ]
        for key, style in _PUSH.items():
            value = finite_number(row.get(key))
            cells += [_show(value), _bar(value, largest[key], style)]
        table.add_row(*cells[:-1], Text.assemble(cells[-1], arrow))  # type: ignore[arg-type]
    parts.append(table)
    parts.append(Columns([response_panel(row) for row in group], width=_CARD))
    return Group(*parts)


_PUSH = {"target": "blue", "policy": "yellow", "coefficient": "magenta"}


def response_panel(row: Row, with_prompt: bool = False) -> Panel:
    """Return a panel with one response, its verdict and what the objective made of it."""
    title = Text.assemble(
        f"#{row.get('k', '?')} ", _outcome(row), f" reward {_plain(finite_number(row.get('score')))}"
    )
    facts = {
        "w*": "target",
        "P": "policy",
        "c": "coefficient",
        "advantage": "advantage",
        "shaped": "shaped_reward",
    }
    line = [
        f"{name} {_plain(finite_number(row[key]))}"
        for name, key in facts.items()
        if finite_number(row.get(key)) is not None
    ]
    line.append(
        f"{row.get('tokens', '?')} tokens" + (", cut at the limit" if row.get("finished") is False else "")
    )
    parts: list[RenderableType] = []
    if with_prompt:
        where = f"step {row.get('step', '?')}, prompt {row.get('id', '?')}"
        parts += [Text(sanitise(where), "bold"), Text(_cut(str(row.get("input", ""))), "dim")]
        parts += [Text(f"image {caption}", "dim") for _, caption in image_references(row)]
    parts += [Text(_cut(row["output"]) or "(empty response)"), Text(" · ".join(line), "dim")]
    if isinstance(row.get("parts"), dict) and row["parts"]:
        shown = ", ".join(f"{name}={value}" for name, value in row["parts"].items())
        parts.append(Text(sanitise(shown)[:300], "dim"))
    return Panel(Group(*parts), title=title, title_align="left", box=box.ROUNDED)


def responses(rows: Iterable[Row], title: str) -> Group:
    """Return panels of responses below a title."""
    panels = [response_panel(row, with_prompt=True) for row in rows]
    return Group(Text(f"{title} ({len(panels)})", "bold"), *panels)


def prompt_history(run: Run, prompt: str, groups: Sequence[tuple[int, Sequence[Row]]]) -> Group:
    """Return one prompt at all of its steps, and when it was first solved."""
    table = _table(f"Prompt {sanitise(prompt)} in {sanitise(run.name)}")
    for name in ("step", "passed", "reward"):
        table.add_column(name, justify="right")
    table.add_column("best response")
    solved = None
    for step, group in groups:
        passed = sum(row.get("outcome") == "pass" for row in group)
        solved = step if passed and solved is None else solved
        top = max(group, key=lambda row: finite_number(row.get("score")) or 0.0)
        text = " ".join(sanitise(top["output"]).split())[:60]
        table.add_row(str(step), f"{passed}/{len(group)}", _show(_mean(group, "score")), Text(text))
    return Group(table, Text(f"first solved at step {solved}" if solved is not None else "never solved"))


def difference(names: Sequence[str], of: RunDifference) -> Group:
    """Return what differs between two runs."""
    parts: list[RenderableType] = []
    for title, rows in (("Settings", of.config), ("Code, data and devices", of.about)):
        parts.append(_pairs(title, names, rows) if rows else Text(f"{title}: equal", "green"))
    if of.metrics_step is None:
        parts.append(Text("Metrics: equal wherever both runs have them", "green"))
    else:
        values = [
            (name, _plain(finite_number(x)), _plain(finite_number(y))) for name, x, y in of.metrics[:12]
        ]
        more = f", the first 12 of {len(of.metrics)}" if len(of.metrics) > 12 else ""
        parts.append(_pairs(f"Metrics that differ first, at step {of.metrics_step}{more}", names, values))
    if of.response is None:
        line = (
            f"Responses: all {of.compared} that both runs have are equal"
            if of.compared
            else "Responses: none in common"
        )
        parts.append(Text(line, "green" if of.compared else "yellow"))
        return Group(*parts)
    first = of.response
    parts.append(
        Text(
            f"First response that differs: step {first.step}, prompt {sanitise(first.id)}, k {first.k}, from "
            f"{first.unit} {first.position} on; {first.equal} of {first.compared} responses of that step are equal",
            "bold",
        )
    )
    for name, rest in zip(names, first.rest):
        shown = Text.assemble((_cut(first.common), "dim"), (_cut(rest) or "(ends here)", "bold yellow"))
        parts.append(Panel(shown, title=Text(sanitise(name)), title_align="left", box=box.ROUNDED))
    return Group(*parts)


def _step_table(run: Run) -> Table:
    merged: dict[int, dict] = {}
    for row in run.metrics:
        merged.setdefault(row["step"], {}).update(row)
    steps = [
        step for step in merged if _COLUMNS["reward"] in merged[step] or _COLUMNS["gradient"] in merged[step]
    ]
    stride = max(1, -(-len(steps) // _MOST_STEPS))
    title = "Steps" if stride == 1 else f"Steps (every {stride}th)"
    table = _table(title)
    table.add_column("step", justify="right")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("held-out pass@1", justify="right")
    for step in sorted({*steps[::-1][::stride], *(s for s in merged if _held(merged[s]) is not None)}):
        row = merged[step]
        cells = [
            _show(finite_number(row.get(name)), share=label in _SHARES) for label, name in _COLUMNS.items()
        ]
        table.add_row(str(step), *cells, _show(_held(row), share=True))
    return table


def _held(row: Row) -> float | None:
    found = [
        value for name, value in row.items() if name.startswith("val-core/") and name.endswith("/pass@1")
    ]
    return finite_number(found[0]) if found else None


def _pairs(title: str, names: Sequence[str], rows: Iterable[tuple]) -> Table:
    table = _table(title)
    for name in ("", *names):
        table.add_column(Text(sanitise(name)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(sanitise(str(cell))) for cell in row))
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _framed(title: str, text: str, style: str) -> Panel:
    return Panel(Text(_cut(text), style), title=Text(title), title_align="left", box=box.ROUNDED)


def _outcome(row: Row) -> Text:
    outcome = str(row.get("outcome", "not judged"))
    return Text(sanitise(outcome), OUTCOME_STYLES.get(outcome, "magenta"))


def _bar(value: float | None, largest: float, style: str) -> Text:
    return Text("█" * round(_BAR * abs(value or 0.0) / largest) if largest else "", style)


def _largest(group: Sequence[Row]) -> float:
    return max(abs(finite_number(row.get("coefficient")) or 0.0) for row in group)


def _mean(group: Sequence[Row], key: str) -> float | None:
    values = [value for row in group if (value := finite_number(row.get(key))) is not None]
    return sum(values) / len(values) if values else None


def _show(value: float | None, share: bool = False) -> Text:
    return Text("–" if value is None else f"{100 * value:.1f}%" if share else f"{value:.4g}")


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _cut(text: str) -> str:
    text = sanitise(text)
    return (
        text
        if len(text) <= _MOST_CHARACTERS
        else f"{text[: _MOST_CHARACTERS // 2]}\n…\n{text[-_MOST_CHARACTERS // 2 :]}"
    )
