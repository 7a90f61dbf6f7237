"""Tables show the right values, and model output cannot control the terminal."""

import io

import numpy as np
import pytest
from rich.console import Console

from lpo_jax.evaluation.metrics import paired_difference, summarise
from lpo_jax.reporting import (
    batch_table,
    before_after_table,
    duration,
    group_panel,
    percent,
    sample_panel,
    sanitise,
)


def _print(renderable, width=80, **options):
    out = io.StringIO()
    Console(file=out, width=width, **options).print(renderable)
    return out.getvalue()


def test_batch_table_shows_name_value_and_meaning():
    text = _print(
        batch_table([("rows", 65536, "prompts x responses"), ("dtype", "bfloat16", "[of] the weights")])
    )
    row, other = (next(line for line in text.splitlines() if word in line) for word in ("rows", "dtype"))
    assert row.split() == ["rows", "65,536", "prompts", "x", "responses"]
    assert other.split() == ["dtype", "bfloat16", "[of]", "the", "weights"]


def _evaluations():
    rng = np.random.default_rng(0)
    return np.zeros((32, 4)), rng.random((32, 4)) < 0.1, rng.random((32, 4)) < 0.6


def test_before_after_table_fits_80_columns_and_is_complete():
    cold, warm, trained = _evaluations()
    summaries = [summarise(flags, ks=[1, 4]) for flags in (cold, warm, trained)]
    change = paired_difference(warm, trained, ks=[1, 4])
    text = _print(
        before_after_table(
            [
                ("cold model", summaries[0], None),
                ("after warm start", summaries[1], None),
                ("after RL", summaries[2], change),
            ]
        ),
        width=90,
    )
    for summary in summaries:
        for k in (1, 4):
            score = summary[f"pass@{k}"]
            assert percent(score["mean"]) in text
            assert f"{percent(score['ci_low'])} to {percent(score['ci_high'])}" in text
    assert f"+{100 * change['pass@1']['mean']:.1f}" in text
    assert "32 problems x 4 samples" in text
    assert "…" not in text  # nothing was truncated


def test_before_after_table_without_changes_has_no_column_for_them():
    summary = summarise(_evaluations()[1])
    assert "change" not in _print(before_after_table([("model", summary, None)])).lower()


def test_change_is_coloured_only_where_its_interval_excludes_zero():
    _, warm, trained = _evaluations()
    lucky = warm.copy()
    lucky[0] = True  # one of 32 problems changes from failure to success
    assert (
        paired_difference(warm, lucky)["pass@1"]["mean"]
        > 0
        >= paired_difference(warm, lucky)["pass@1"]["ci_low"]
    )
    green = "\x1b[1;32m"
    for after, expected in ((trained, True), (lucky, False)):
        table = before_after_table(
            [("a", summarise(warm), None), ("b", summarise(after), paired_difference(warm, after))]
        )
        text = _print(table, force_terminal=True, color_system="standard")
        assert (green in text) is expected


def test_verifier_failures_are_reported():
    valid = np.ones((32, 4), bool)
    valid[0, :3] = False
    text = _print(before_after_table([("model", summarise(_evaluations()[1], valid), None)]))
    assert "3 samples not counted" in text


def test_sanitise_escapes_control_characters():
    assert sanitise("a\x1b[2Jb\rc\x00\x9b") == "a\\x1b[2Jb\\x0dc\\x00\\x9b"
    assert sanitise("\u202egnp.exe \u200b\ufeff \udc80 \U000e0041") == (
        "\\u202egnp.exe \\u200b\\ufeff \\udc80 \\U000e0041"
    )
    assert sanitise("3 + 5 = 8\n\tété 日本 ∑ [bold]") == "3 + 5 = 8\n    été 日本 ∑ [bold]"


def test_sample_panel_shows_markup_and_escapes_literally():
    samples = [
        {
            "prompt": "[bold]p[/bold]",
            "response": "[/] :smile: \x1b[2J\u202e",
            "reward": 0.1,
            "outcome": "wrong",
        },
        {"prompt": "q", "response": "", "reward": None, "outcome": "timeout"},
        {"prompt": "third", "response": "unseen", "reward": 1.0, "outcome": "pass"},
    ]
    text = _print(sample_panel(samples, limit=2))
    assert "[bold]p[/bold]" in text and "[/] :smile: \\x1b[2J\\u202e" in text
    assert "wrong · reward 0.1" in text and "timeout · reward none" in text
    assert "(empty response)" in text
    assert "unseen" not in text
    assert "\x1b" not in text and "\u202e" not in text


def test_sample_panel_reports_how_much_it_omits():
    response = "begin" + "x" * 1000 + "the end"
    text = _print(
        sample_panel([{"prompt": "p", "response": response, "reward": 1, "outcome": "pass"}], max_chars=100)
    )
    assert "begin" in text and "the end" in text
    assert "912 characters left out" in text


def test_sample_panel_without_samples():
    assert "no responses" in _print(sample_panel([]))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (3599.7, "1h 00m"),
        (7500, "2h 05m"),
        (90000, "1d 01h"),
        (float("nan"), "?"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_score_that_is_not_the_pass_rate_has_a_column_of_its_own():
    summary = summarise(_evaluations()[1])
    rewarded = summary | {"score": {"name": "reward", "mean": 2.5, "ci_low": 2.25, "ci_high": 2.75}}
    change = {"score": {"mean": -0.5, "ci_low": -0.75, "ci_high": -0.25}}
    text = _print(before_after_table([("a", rewarded, None), ("b", rewarded, change)]))
    assert "reward" in text and "2.500" in text and "2.250 to 2.750" in text and "-0.750 to -0.250" in text
    passes = summary | {"score": {"name": "pass"} | summary["pass@1"]}
    assert "change" not in _print(before_after_table([("a", passes, None)]))


def _record(group, k, score, logp, output="x", outcome="wrong"):
    return {
        "id": group,
        "k": k,
        "input": f"prompt {group}",
        "output": output,
        "score": score,
        "outcome": outcome,
        "logp": logp,
        "parts": {"format": score / 2, "answer": "[7]"},
    }


def test_group_panel_shows_the_best_worst_and_most_surprising_response():
    equal = [_record(0, k, 1.0, -1.0) for k in range(3)]
    mixed = [
        _record(1, 0, 0.0, -1.0, "[red]low[/red]"),
        _record(1, 1, 0.5, -9.0, "odd\x1b[31m"),
        _record(1, 2, 1.0, -2.0, "good", "pass"),
        _record(1, 3, 0.5, -1.0, "not shown"),
    ]
    text = _print(group_panel([*equal, *mixed], step=7))
    assert "step 7" in text and "prompt 1" in text and "prompt 0" not in text
    assert "pass · best · reward 1 · format 0.5" in text and "good" in text
    assert "wrong · worst · reward 0" in text and "[red]low[/red]" in text
    assert "wrong · surprising · reward 0.5" in text and "not shown" not in text and "\x1b" not in text
    assert "wrong · best, worst, surprising · reward 1" in _print(group_panel(equal, step=7))
