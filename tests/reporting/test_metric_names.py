"""The table of metric names is complete and strict, and the documentation is rendered from it."""

import ast
import math
import re
from pathlib import Path

import pytest

from lpo_jax.evaluation.metrics import summarise
from lpo_jax.reporting import metric_names as N

PACKAGE = Path(N.__file__).parents[1]
FOREIGN = {"objective/x", "hook/x"}


@pytest.mark.parametrize(
    "name",
    [
        "critic/score/max",
        "response_length/clip_ratio",
        "reward/outcome/infrastructure",
        "lpo/target_tv",
        "val-core/countdown/acc/mean@4",
        "val-core/openai/gsm8k/acc/pass@16",
        "val-aux/openai/gsm8k/acc/pass@16/ci_low",
    ],
)
def test_known_names(name):
    N.check([name])


@pytest.mark.parametrize(
    "name",
    [
        "critic/score",
        "critic/score/median",
        "critic/score/max/extra",
        "xcritic/score/max",
        "reward/outcome/",
        "val-core/countdown/acc/pass@k",
        "val-core//acc/pass@1",
        "lpo/targetXtv",
        "step",
    ],
)
def test_unknown_names_are_rejected(name):
    with pytest.raises(ValueError, match="unknown metric"):
        N.check([name])


def test_the_error_suggests_the_closest_name():
    with pytest.raises(ValueError, match="did you mean 'actor/grad_norm'"):
        N.check(["actor/lr", "actor/gradnorm"])


def test_timing_metrics_depend_on_the_machine():
    assert all(
        map(N.is_timing, ["timing_s/gen", "perf/throughput", "perf/compiles", "perf/cpu_memory_used_gb"])
    )
    assert not any(map(N.is_timing, ["perf/total_num_tokens", "actor/grad_norm", "step", "no/such/name"]))


def test_no_name_matches_two_rows():
    examples = _examples()
    assert len(examples) == len(set(examples)) > 70
    for name in examples:
        assert sum(bool(pattern.fullmatch(name)) for pattern, _ in N._PATTERNS) == 1, name


def test_every_name_is_written_somewhere():
    """Each name of the table is a string of the package, matches one of its f-strings,
    or is one of its strings plus mean, max or min.

    Strings of `reporting` do not count: it reads and displays metrics. Hooks and objectives of users write the names
    of `FOREIGN`.
    """
    strings, templates = set(), []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else None for p in node.values]
                if parts[0] and "/" in parts[0]:
                    templates.append(re.compile("".join(".+" if p is None else re.escape(p) for p in parts)))
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and path.parent.name != "reporting"
            ):
                strings.add(node.value)
    for name in set(_examples()) - FOREIGN:
        prefix, _, last = name.rpartition("/")
        made = name in strings or (last in ("mean", "max", "min") and prefix in strings)
        assert made or any(template.fullmatch(name) for template in templates), f"nothing writes {name}"


def _examples():
    """All names of the table, one for each word in braces, with values for the placeholders."""
    return [
        name.replace("<data>", "x").replace("<name>", "x").replace("<n>", "4").replace("<k>", "4")
        for metric in N.METRICS
        for name in _expanded(metric.name)
    ]


def _expanded(name):
    if "{" not in name:
        return [name]
    head, rest = name.split("{")
    words, tail = rest.split("}")
    return [head + word + tail for word in words.split(",")]


def test_validation_metrics_are_all_in_the_table():
    summary = summarise([[1, 0, 0, 0], [0, 0, 0, 0]], ks=[1, 4])
    summary["score"] = {"name": "pass"} | summary["pass@1"]
    metrics = N.validation_metrics("countdown", summary)
    N.check(metrics)
    assert metrics["val-core/countdown/acc/mean@4"] == pytest.approx(1 / 8)
    assert metrics["val-core/countdown/acc/pass@4"] == pytest.approx(1 / 2)
    low, high = (metrics[f"val-aux/countdown/acc/pass@4/{part}"] for part in ("ci_low", "ci_high"))
    assert low < 1 / 2 < high
    assert all(math.isfinite(value) for value in metrics.values())


def test_markdown_documents_every_row():
    lines = N.metrics_markdown().splitlines()
    for metric in N.METRICS:
        (line,) = [line for line in lines if line.startswith(f"| `{metric.name}`")]
        assert line.replace("\\|", "").count("|") == 4  # three cells; bars inside the meaning are escaped
        assert ("†" in line) == metric.timing


def test_the_document_is_up_to_date():
    document = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert document.read_text() == N.metrics_markdown(), (
        "write metric_names.metrics_markdown() to docs/metrics.md"
    )
