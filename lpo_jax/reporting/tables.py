"""Tables for the terminal: batch sizes, evaluations before and after training, benchmarks, methods, sample responses.

Each function returns a rich renderable. Print it with `console().print(...)` or `ProgressDisplay.log(...)`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from lpo_jax.reporting.text import percent, sanitise

_OUTCOME_STYLE = {"pass": "green", "wrong": "red", "malformed": "yellow"}  # verifier failures: magenta


def batch_table(rows: Iterable[tuple[str, object, str]], title: str = "Batch sizes of one step") -> Table:
    """Return a table of the batch sizes that follow from a config.

    Args:
        rows: (name, value, meaning) triples; integers are printed with thousands separators.
        title: title of the table.
    """
    table = _table(title)
    table.add_column("what")
    table.add_column("value", justify="right", style="bold")
    table.add_column("meaning", style="dim")
    for name, value, meaning in rows:
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(Text(name), Text(shown), Text(meaning))
    return table


def before_after_table(
    rows: Sequence[tuple[str, Mapping, Mapping | None]], title: str = "Held-out evaluation"
) -> Group:
    """Return a table of evaluations on the same problems, one per row, with 95% intervals and changes.

    Args:
        rows: (label, summary, difference) triples. `summary` is from `evaluation.metrics.summarise`; `difference`
            is from `paired_difference` between the row above and this row, or None.
        title: title of the table.
    """
    ks = sorted({k for _, summary, _ in rows for k in summary["ks"]})
    scores = {summary["score"]["name"] for _, summary, _ in rows if "score" in summary} - {"pass"}
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        (name, "score", number) for name in sorted(scores)
    ]
    columns += [(f"pass@{k}", f"pass@{k}", percent) for k in ks]
    with_change = any(difference for *_, difference in rows)
    table = _table(title)
    table.add_column("model")
    for heading, *_ in columns:
        table.add_column(heading, justify="right")
        if with_change:
            table.add_column("change", justify="right")
    for index, (label, summary, difference) in enumerate(rows):
        if index:
            table.add_row()
        cells = [Text(label)]
        for _, key, show in columns:
            cells.append(_score(summary.get(key), show))
            if with_change:
                cells.append(_change((difference or {}).get(key), show))
        table.add_row(*cells)
    return Group(table, _caption([summary for _, summary, _ in rows], with_change))


def sample_panel(
    samples: Iterable[Mapping], limit: int = 3, max_chars: int = 1200, title: str = "Sample responses"
) -> Panel:
    """Return a panel with a few prompts and responses, escaped for the terminal.

    Args:
        samples: dicts with `prompt`, `response`, `reward` and `outcome`.
        limit: the largest number of samples shown.
        max_chars: longer texts are shortened in the middle; the number of omitted characters is shown.
        title: title of the panel.
    """
    parts: list[Text | Rule] = []
    for sample in list(samples)[:limit]:
        outcome = str(sample.get("outcome", "?"))
        verdict = Text.assemble(
            (sanitise(outcome), _OUTCOME_STYLE.get(outcome, "magenta")), f" · reward {_reward(sample)}"
        )
        if parts:
            parts.append(Text())
        parts.append(Rule(verdict, align="left", style="dim"))
        parts.append(Text(_shorten(sanitise(str(sample["prompt"])), max_chars), "dim"))
        parts.append(
            Text(_shorten(sanitise(str(sample["response"])), max_chars) or "(empty response)", "bold")
        )
    return Panel(
        Group(*parts or [Text("no responses")]), title=Text(title), title_align="left", box=box.ROUNDED
    )


def notable_responses(group: Sequence[Mapping]) -> list[tuple[str, Mapping]]:
    """Choose the best, the worst and the most surprising response of a group, fewer if they are the same.

    Args:
        group: records of responses (`docs/records.md`). The most surprising one has the lowest mean log-prob.
    """
    chosen: dict[int, list[str]] = {}
    for label, key in (
        ("best", lambda r: -r["score"]),
        ("worst", lambda r: r["score"]),
        ("surprising", _logp),
    ):
        chosen.setdefault(min(range(len(group)), key=lambda k: key(group[k])), []).append(label)
    return [(", ".join(labels), group[k]) for k, labels in chosen.items()]


def group_panel(records: Sequence[Mapping], step: int, max_chars: int = 400) -> Panel:
    """Return a panel with a few responses of one group: the first of those whose rewards differ most.

    Args:
        records: of a step, group by group.
        step: for the title.
        max_chars: longer texts are shortened in the middle.
    """
    groups = [list(group) for _, group in itertools.groupby(records, key=lambda record: record["id"])]
    group = max(groups, key=lambda group: max(r["score"] for r in group) - min(r["score"] for r in group))
    parts: list[Text | Rule] = [Text(_shorten(sanitise(str(group[0]["input"])), max_chars), "dim")]
    for label, record in notable_responses(group):
        numbers = [f"{name} {value:g}" for name, value in record["parts"].items() if isinstance(value, float)]
        facts = f" · {label} · reward {_reward({'reward': record['score']})}"
        facts += "".join(f" · {sanitise(fact)}" for fact in numbers)
        outcome = str(record["outcome"])
        verdict = Text.assemble((outcome, _OUTCOME_STYLE.get(outcome, "magenta")), facts)
        parts.append(Rule(verdict, align="left", style="dim"))
        parts.append(Text(_shorten(sanitise(str(record["output"])), max_chars) or "(empty response)", "bold"))
    title = Text(f"Responses of step {step}")
    return Panel(Group(*parts), title=title, title_align="left", box=box.ROUNDED)


def _logp(record: Mapping) -> float:
    return record["logp"]


def _table(title: str) -> Table:
    return Table(
        title=Text(title, "bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def number(value: float) -> str:
    """Format a score that is not a fraction."""
    return f"{value:.3f}"


def _score(score: Mapping | None, show: Callable[[float], str] = percent) -> Text:
    if score is None or not math.isfinite(score["mean"]):
        return Text("-")
    interval = f"{show(score['ci_low'])} to {show(score['ci_high'])}"
    return Text.assemble((show(score["mean"]), "bold"), "\n", (interval, "dim"))


def _change(change: Mapping | None, show: Callable[[float], str] = percent) -> Text:
    if change is None or not math.isfinite(change["mean"]):
        return Text("")
    signed = (lambda value: f"{100 * value:+.1f}") if show is percent else (lambda value: f"{value:+.3f}")
    mean, low, high = (signed(change[part]) for part in ("mean", "ci_low", "ci_high"))
    # Only changes whose interval excludes 0 are coloured.
    style = "bold green" if change["ci_low"] > 0 else "bold red" if change["ci_high"] < 0 else ""
    return Text.assemble((mean, style), "\n", (f"{low} to {high}", "dim"))


def _caption(summaries: Sequence[Mapping], with_change: bool) -> Text:
    sizes = list(dict.fromkeys((s["problems"], s["samples_per_problem"]) for s in summaries))
    text = "; ".join(f"{problems} problems x {samples} samples" for problems, samples in sizes)
    invalid = sum(summary["invalid_samples"] for summary in summaries)
    if invalid:
        text += f"; {invalid} samples not counted because the verifier failed on them"
    text += ". Below each score: its 95% bootstrap interval over problems."
    if with_change:
        text += " Change: percentage points relative to the row above, paired by problem."
    return Text(text, "dim")


def _reward(sample: Mapping) -> str:
    reward = sample.get("reward")
    return "none" if reward is None else f"{reward:g}"


def _shorten(text: str, limit: int) -> str:
    # The end is kept because it usually contains the answer.
    if len(text) <= limit:
        return text
    head, tail = text[: limit // 2], text[len(text) - limit // 2 :]
    return f"{head}\n… {len(text) - len(head) - len(tail):,} characters left out …\n{tail}"


def method_table(methods: Iterable[Mapping]) -> Table:
    """Return a table of the catalogue of methods.

    Args:
        methods: dicts with `name`, `formula`, `paper`, `fidelity`, `note`, `options` and `needs`.
    """
    table = _table("Methods")
    for column in ("name", "formula and paper", "fidelity", "options and defaults"):
        table.add_column(column)
    for method in methods:
        # No line break between an option and its default.
        options = ", ".join(
            f"{key}={value}".replace(" ", "\N{NO-BREAK SPACE}") for key, value in method["options"].items()
        )
        what = Text.assemble(method["formula"], "\n", (method["paper"], "dim"))
        for line in (method["note"], method["needs"] and f"needs {', '.join(method['needs'])}"):
            what.append(f"\n{line}" if line else "", "dim")
        table.add_row(Text(method["name"], "bold"), what, Text(method["fidelity"]), Text(options))
        table.add_section()
    return table


def suite_table(results: Mapping[str, Mapping], mean: float, title: str) -> Group:
    """Return a table of one model's results on benchmarks, one per row, with 95% intervals.

    Args:
        results: benchmark name to the result of `evaluation.suite.run_benchmark`.
        mean: pass@1 averaged over the benchmarks.
        title: title of the table.
    """
    table = _table(title)
    table.add_column("benchmark")
    for column in ("problems", "k", "pass@1 (avg@k)", "pass@k", "maj@k", "cut", "tokens"):
        table.add_column(column, justify="right")
    for index, (name, result) in enumerate(results.items()):
        if index:
            table.add_row()
        k = result["samples_per_problem"]
        scores = (_score(result[score]) for score in ("pass@1", f"pass@{k}", f"maj@{k}"))
        cut, length = percent(result["truncated"]), f"{result['mean_length']:,.0f}"
        table.add_row(Text(name, "bold"), f"{result['problems']:,}", str(k), *scores, cut, length)
    notes = [
        "Below each score: its 95% bootstrap interval over problems. cut: responses that reached --max-tokens."
    ]
    if len(results) > 1:
        notes.append(f"pass@1, mean over the benchmarks: {percent(mean)}.")
    for count, what in (
        ("invalid_samples", "samples not counted because the verifier failed on them"),
        ("left_out", "problems left out because their prompts are too long"),
        ("skipped", "problems left out because their gold answers cannot be used"),
    ):
        if lost := sum(result[count] for result in results.values()):
            notes.append(f"{lost} {what}.")
    return Group(table, Text(" ".join(notes), "dim"))
