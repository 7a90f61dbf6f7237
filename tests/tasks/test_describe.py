"""What `lpo data` says of a task."""

import json

import pytest

from lpo_jax import tasks
from lpo_jax.cli import main
from lpo_jax.tasks.describe import describe, lines

GSM8K = [{"question": f"{'x' * n} {n} + 1?", "answer": f"{n}+1\n#### {n + 1}"} for n in range(8)]


def test_describe(write):
    path, heldout = write("a.jsonl", [*GSM8K, GSM8K[0]]), write("b.jsonl", GSM8K[6:])
    task = tasks.get("gsm8k", path=path, heldout=heldout, template="{question}")
    summary = describe(task)
    assert summary["content_hash"] == task.content_hash and summary["overlap"] == 0
    assert (
        summary["train"]["rows"]
        == summary["train"]["different_prompts"]
        == summary["train"]["with_solution"]
        == 6
    )
    assert summary["train"]["longest_prompt"] == len("xxxxx 5 + 1?") and summary["unit"] == "characters"
    assert summary["train"]["duplicates"] == 1 and summary["train"]["held_out"] == 2
    assert (summary["prompt"], summary["row"]["answer"]) == (" 0 + 1?", "1")
    assert summary["verdict"]["outcome"] == "pass"
    shown = "\n".join(lines(summary))
    assert task.content_hash in shown and "judged pass" in shown
    assert json.loads(json.dumps(summary)) == summary


def test_repeats_and_overlap_of_a_plain_file(write):
    path, heldout = write("a.jsonl", GSM8K * 2), write("b.jsonl", GSM8K[:3])
    options = {"prompt": "{question}", "verifier": "gsm8k"}
    with pytest.warns(UserWarning, match="3 of 3 held-out prompts are trained on too"):
        task = tasks.get("jsonl", path=path, heldout=heldout, **options)
    summary = describe(task)
    assert (summary["train"]["rows"], summary["train"]["different_prompts"], summary["overlap"]) == (16, 8, 3)
    assert summary["solution"] is None and "verdict" not in summary


def test_lengths_are_those_the_model_sees(write):
    task = tasks.get("gsm8k", heldout=write("a.jsonl", GSM8K[:2]), template="{question}")
    summary = describe(
        task, encode=lambda prompt: [1, *map(ord, prompt)], decode=lambda ids: f"{len(ids)} ids"
    )
    assert (summary["heldout"]["longest_prompt"], summary["unit"], summary["prompt"]) == (
        9,
        "tokens",
        "8 ids",
    )
    assert summary["train"]["rows"] == 0


def test_command(write, capsys, tmp_path, run_config):
    rows = [{"id": n, "problem": f"{n}?", "answer": n} for n in range(20)]
    path = write("a.jsonl", [*rows, {"problem": "?", "answer": ""}])
    with pytest.warns(UserWarning, match="1 of 21 rows"):
        assert main(["data", "math", f"--task.path={path}", "--task.heldout_size=3", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["train"]["rows"], summary["heldout"]["rows"], summary["train"]["skipped"]) == (17, 3, 1)

    import yaml

    task = {"name": "jsonl", "path": write("b.jsonl", GSM8K), "prompt": "{question}", "verifier": "gsm8k"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_config(task=task)))
    assert main(["data", str(tmp_path / "config.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "lengths in tokens" in printed and "verifier      gsm8k" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mth"], "mth: no such config file, and no task; tasks are arithmetic"),
        (["math"], "task math needs the option 'path'"),
        (["math", "--task.path=none.json"], "none.json: No such file"),
        (["math", "--task.pth=a.json"], "no option 'pth'; did you mean 'path'"),
    ],
)
def test_command_mistakes(capsys, arguments, message):
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
