"""A run directory is read as far as it goes, and what it lacks is named."""

import json

import pytest

from lpo_jax.errors import UserError
from lpo_jax.files import lock_directory
from lpo_jax.inspection.load import flatten, groups_of, read_run, read_samples, status
from lpo_jax.inspection.page import render
from lpo_jax.inspection.verdict import judge


def test_a_complete_run(synthetic_run):
    run = read_run(synthetic_run)
    assert not run.missing
    assert (run.last_step, run.total_steps, list(run.rollouts)) == (6, 6, [1, 2, 3, 4, 5, 6])
    assert list(run.evaluations) == [(0, False), (3, False), (6, False)]
    rows, notes = read_samples(run.rollouts[2])
    assert [len(group) for group in groups_of(rows)] == [4] * 4 and not notes


@pytest.mark.parametrize("make", ["missing", "file", "empty", "other"])
def test_what_is_no_run_is_one_clear_line(tmp_path, make):
    path = tmp_path / "thing"
    if make == "file":
        path.write_text("x")
    elif make != "missing":
        path.mkdir()
    if make == "other":
        (path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"is not a directory|holds no records of a run") as raised:
        read_run(path)
    assert "\n" not in str(raised.value)


def test_a_comparison_names_its_cells(tmp_path):
    (tmp_path / "cells").mkdir()
    with pytest.raises(UserError, match=r"it is a comparison.*/cells"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "damage, named",
    [
        ("config.yaml", "config cannot be read"),
        ("run.json", "no run.json"),
        ("metrics.jsonl", "metrics cannot be read"),
        ("rollouts/2.jsonl", "rollout files of step 2 are missing"),
    ],
)
def test_a_missing_file_is_named_and_the_rest_is_shown(own_run, damage, named):
    (own_run / damage).unlink()
    run = read_run(own_run)
    assert any(named in note for note in run.missing), run.missing
    assert named in render([run])


def test_damaged_files_are_named_and_the_rest_is_shown(own_run):
    rollouts = own_run / "rollouts" / "2.jsonl"
    lines = rollouts.read_bytes().splitlines(keepends=True)
    rollouts.write_bytes(b"".join(lines[:3]) + b"[1]\n" + b"".join(lines[4:-1]) + lines[-1][:20])
    (own_run / "rollouts" / "3.jsonl").write_bytes(b"\xff\xfe\x00")
    metrics = own_run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 9, "act')
    (own_run / "config.yaml").write_text("a: [")
    (own_run / "run.json").write_text("{")
    run = read_run(own_run)
    assert run.last_step == 3
    assert len(read_samples(run.rollouts[2])[0]) == len(lines) - 2
    html = render([run])
    assert "rollouts/2.jsonl: damaged lines left out: 2, the first is line 4" in html
    assert "rollouts/3.jsonl: damaged lines left out: 1" in html
    assert "config cannot be read" in html and "run.json is damaged" in html


def test_an_older_run_lacks_keys(own_run):
    for path in (own_run / "rollouts").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = ("id", "k", "input", "output", "score", "outcome")
        path.write_text("".join(json.dumps({key: row[key] for key in kept}) + "\n" for row in rows))
    run = read_run(own_run)
    (note,) = run.missing
    assert "the target w*, the policy P and the coefficient c" in note and "gold answers" in note
    assert "the target w*" in render([run])


def test_the_status_follows_lock_and_steps(own_run):
    assert status(read_run(own_run)) == "finished"
    (own_run / "rollouts" / "3.jsonl").unlink()
    rows = (own_run / "metrics.jsonl").read_text().splitlines()
    (own_run / "metrics.jsonl").write_text("\n".join(row for row in rows if '"step": 3' not in row) + "\n")
    assert status(read_run(own_run)) == "stopped"
    with lock_directory(own_run, "run"):
        assert status(read_run(own_run)) == "running"
    assert status(read_run(own_run)) == "stopped"


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def _evaluate(run, step, passed, name=None):
    rows = [
        {"id": i, "k": 0, "output": "x", "outcome": "pass" if of else "wrong"} for i, of in enumerate(passed)
    ]
    path = run / "validation" / f"{name or step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"step": step, "val-core/toy/acc/pass@1": sum(passed) / len(passed)}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    "before, after, kind",
    [
        ([0] * 40, [1] * 30 + [0] * 10, "better"),
        ([1] * 30 + [0] * 10, [0] * 40, "worse"),
        ([0, 1] * 20, [1, 0] * 20, "unclear"),
    ],
)
def test_the_verdict_is_paired_by_problem(tmp_path, before, after, kind):
    _evaluate(tmp_path, 0, before)
    _evaluate(tmp_path, 5, after)
    verdict = judge(read_run(tmp_path))
    assert verdict.kind == kind and "over 40 problems" in verdict.sentence


def test_the_verdict_compares_with_the_warm_start_and_names_the_base(tmp_path):
    _evaluate(tmp_path, 0, [0] * 20, "0")
    _evaluate(tmp_path, 0, [1] * 5 + [0] * 15, "0.warm-started")
    _evaluate(tmp_path, 8, [1] * 20)
    sentence = judge(read_run(tmp_path)).sentence
    assert "from 25.0% (the warm-started model) to 100.0% at step 8 (+75.0 points" in sentence
    assert "The base model had 0.0% before its warm start" in sentence


def test_the_verdict_follows_the_score_of_the_config(tmp_path):
    for step, rewards in ((0, [0.1] * 20), (4, [0.5, 0.7] * 10)):
        path = tmp_path / "validation" / f"{step}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [{"id": i, "output": "x", "outcome": "wrong", "score": of} for i, of in enumerate(rewards)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with open(tmp_path / "metrics.jsonl", "a") as file:
            row = {
                "step": step,
                "val-core/toy/acc/pass@1": 0.0,
                "val-core/toy/score/mean@1": sum(rewards) / 20,
            }
            file.write(json.dumps(row) + "\n")
    (tmp_path / "config.yaml").write_text("evaluation:\n  score: reward\n")
    verdict = judge(read_run(tmp_path))
    assert verdict.kind == "better"
    assert "toy reward rose from 0.1 (the model at step 0) to 0.6 at step 4 (+0.500, 95%" in verdict.sentence


def test_without_responses_there_is_no_interval(tmp_path):
    _evaluate(tmp_path, 0, [0] * 20)
    _evaluate(tmp_path, 8, [1] * 20)
    (tmp_path / "validation" / "0.jsonl").unlink()
    verdict = judge(read_run(tmp_path))
    assert verdict.kind == "unclear" and "without an interval" in verdict.sentence


def test_one_evaluation_says_nothing_about_learning(tmp_path):
    _evaluate(tmp_path, 0, [0] * 20)
    assert judge(read_run(tmp_path)).kind == "unknown"
