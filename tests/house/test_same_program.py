"""scripts/same_program.py finds every difference in what it compares, and ignores durations."""

import json

import pytest
import same_program

ROWS = [
    {
        "step": 1,
        "actor/grad_norm": 0.1,
        "perf/total_num_tokens": 100,
        "timing_s/gen": 1.5,
        "perf/throughput": 3.0,
    },
    {"step": 2, "actor/grad_norm": None, "val": [{"text": "7", "ended": True}, 1e-9]},
]


def values(rows):
    read = json.loads(json.dumps(rows), parse_float=str, parse_int=str)
    return {"run/metrics.jsonl": dict(same_program._leaves(read))}


def test_equal_runs_are_equal_whatever_their_durations(capsys):
    slower = [ROWS[0] | {"timing_s/gen": 9.0, "perf/throughput": 0.5}, ROWS[1]]
    assert same_program._report(values(ROWS), values(slower)) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "8", "8"]


@pytest.mark.parametrize(
    "rows, found",
    [
        (
            [ROWS[0] | {"actor/grad_norm": 0.1 + 1e-16}, ROWS[1]],
            "[0].actor/grad_norm: 0.1 before, 0.1000000000000001",
        ),
        (
            [ROWS[0] | {"perf/total_num_tokens": 101}, ROWS[1]],
            "[0].perf/total_num_tokens: 100 before, 101 after",
        ),
        ([ROWS[0] | {"new": 1}, ROWS[1]], "[0].new: None before, 1 after"),
        (ROWS[:1], "[1].step: 2 before, None after"),
        ([ROWS[0], ROWS[1] | {"actor/grad_norm": 0.0}], "[1].actor/grad_norm: null before, 0.0 after"),
    ],
)
def test_any_difference_is_found(rows, found, capsys):
    assert same_program._report(values(ROWS), values(rows)) == 1
    assert f"DIFFERS run/metrics.jsonl: {found}" in capsys.readouterr().out


def test_a_file_without_values_is_no_evidence(capsys):
    assert same_program._report(values([]), values([])) == 1
