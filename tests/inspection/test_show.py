"""`lpo show` and `lpo diff` print what the files hold, and a mistake is one line."""

import json
import shutil

import pytest

from lpo_jax.commands.main import main
from lpo_jax.inspection.diff import compare_runs
from lpo_jax.inspection.load import read_run, read_samples


def shown(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_the_summary(synthetic_run, capsys):
    out = shown(capsys, "show", synthetic_run)
    assert "finished, step 6 of 6" in out and "held-out countdown pass@1" in out
    assert out.count("%") > 20


def test_a_step_and_a_group(synthetic_run, capsys):
    rows = read_samples(synthetic_run / "rollouts" / "3.jsonl")[0]
    out = shown(capsys, "show", synthetic_run, "--step", 3)
    assert all(f"\n {row['id']} " in out for row in rows)
    group = [row for row in rows if row["id"] == rows[0]["id"]]
    out = shown(capsys, "show", synthetic_run, "--step", 3, "--prompt", rows[0]["id"])
    for row in group:
        assert f"w* {row['target']:.4g} · P {row['policy']:.4g} · c {row['coefficient']:.4g}" in out
    assert f"gold answer  {rows[0]['gts']}" in out


def test_a_prompt_across_steps(synthetic_run, capsys):
    out = shown(capsys, "show", synthetic_run, "--prompt", 5)
    assert "solved" in out and out.count("/4") == 2


@pytest.mark.parametrize(
    "arguments, holds",
    [
        (("--outcome", "wrong"), lambda row: row["outcome"] == "wrong"),
        (("--min-reward", "0.05", "--max-reward", "0.5"), lambda row: 0.05 <= row["score"] <= 0.5),
        (("--min-tokens", "45"), lambda row: row["tokens"] >= 45),
        (("--regex", r"multiply .* subtract$"), lambda row: False),
        (("--prompt", "5", "--outcome", "pass"), lambda row: row["id"] == 5 and row["outcome"] == "pass"),
    ],
)
def test_filters(synthetic_run, capsys, arguments, holds):
    import re

    rows = [row for path in sorted((synthetic_run / "rollouts").iterdir()) for row in read_samples(path)[0]]
    if arguments[0] == "--regex":
        holds = lambda row: re.search(arguments[1], row["output"])  # noqa: E731
    expected = sum(bool(holds(row)) for row in rows)
    out = shown(capsys, "show", synthetic_run, *arguments, "--limit", 1000)
    assert (out.count("╭─ #") == expected) if expected else "no response of 6 steps" in out


def test_best_and_worst(synthetic_run, capsys):
    out = shown(capsys, "show", synthetic_run, "--step", 2, "--best", 2, "--worst", 3)
    best, worst = out.split("worst, of 16 responses (3)")
    rewards = sorted(row["score"] for row in read_samples(synthetic_run / "rollouts" / "2.jsonl")[0])
    assert best.count(f"reward {rewards[-1]:.4g}") >= 2 and worst.count(f"reward {rewards[0]:.4g}") >= 3


@pytest.mark.parametrize(
    "arguments, line",
    [
        (("--step", "99"), "has no rollout file of this step; it has 6 steps from 1 to 6"),
        (("--prompt", "nobody"), "has no such prompt at any step"),
        (("--regex", "("), "is not a regular expression"),
    ],
)
def test_mistakes(synthetic_run, capsys, arguments, line):
    assert main(["show", str(synthetic_run), *arguments]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["show", "report", "watch"])
def test_a_directory_that_is_no_run(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 2
    assert "holds no records of a run" in capsys.readouterr().err


def test_hostile_texts_do_not_reach_the_terminal(tmp_path, capsys):
    from synthetic_run import write_run

    run = write_run(tmp_path / "hostile", steps=1, responses=8, hostile=True)
    for arguments in ((), ("--step", 1), ("--step", 1, "--prompt", 4), ("--best", 40)):
        out = shown(capsys, "show", run, *arguments)
        assert not any(char in out for char in "\x07\x1b\x00\u202e\ud800")
    assert "\\x1b[31mred\\x07 \\x00 \\u202e reversed \\ud800" in out


def test_equal_runs_do_not_differ(synthetic_run, tmp_path, capsys):
    copy = shutil.copytree(synthetic_run, tmp_path / "copy")
    assert not compare_runs(read_run(synthetic_run), read_run(copy)).any
    assert "all 96 that both runs have are equal" in shown(capsys, "diff", synthetic_run, copy)


def test_the_first_difference_is_found(synthetic_run, tmp_path, capsys):
    copy = shutil.copytree(synthetic_run, tmp_path / "copy")
    path = copy / "rollouts" / "4.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    before = rows[6]["token_text"]
    rows[6]["token_text"] = [*before[:3], "CHANGED ", *before[4:]]
    rows[6]["output"] = "".join(rows[6]["token_text"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("1.0e-05", "2.0e-05"))
    found = compare_runs(read_run(synthetic_run), read_run(copy))
    assert [key for key, _, _ in found.config] == ["optimizer.learning_rate"]
    first = found.response
    assert (first.step, first.id, first.k, first.unit, first.position) == (
        4,
        str(rows[6]["id"]),
        rows[6]["k"],
        "token",
        3,
    )
    assert (first.compared, first.equal) == (16, 15)
    out = shown(capsys, "diff", synthetic_run, copy)
    assert "optimizer.learning_rate" in out and "from token 3 on" in out and "CHANGED" in out
