"""The summary that `lpo data` prints."""

import dataclasses
import json

import pytest
import yaml
from tiny import CONFIG, character_tokenizer, random_params

from lpo_jax import tasks
from lpo_jax.commands.main import main
from lpo_jax.rewards import sandbox
from lpo_jax.tasks.describe import describe_task, description_lines

WHY_NOT = sandbox.why_not("bubblewrap")

GSM8K = [{"question": f"{'x' * n} {n} + 1?", "answer": f"{n}+1\n#### {n + 1}"} for n in range(8)]


def test_describe(write):
    path, heldout = write("a.jsonl", [*GSM8K, GSM8K[0]]), write("b.jsonl", GSM8K[6:])
    task = tasks.get("gsm8k", path=path, heldout=heldout, template="{question}")
    summary = describe_task(task)
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
    shown = "\n".join(description_lines(summary))
    assert task.content_hash in shown and "judged pass" in shown
    assert json.loads(json.dumps(summary)) == summary


def test_repeats_and_overlap_of_a_plain_file(write):
    path, heldout = write("a.jsonl", GSM8K * 2), write("b.jsonl", GSM8K[:3])
    options = {"prompt": "{question}", "verifier": "gsm8k"}
    with pytest.warns(UserWarning, match="3 of 3 held-out prompts are also trained on"):
        task = tasks.get("jsonl", path=path, heldout=heldout, **options)
    summary = describe_task(task)
    assert (summary["train"]["rows"], summary["train"]["different_prompts"], summary["overlap"]) == (16, 8, 3)
    assert summary["solution"] is None and "verdict" not in summary


def test_lengths_are_those_the_model_sees(write):
    task = tasks.get("gsm8k", heldout=write("a.jsonl", GSM8K[:2]), template="{question}")
    summary = describe_task(
        task, encode=lambda row: [1, *map(ord, task.prompt(row))], decode=lambda ids: f"{len(ids)} ids"
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

    task = {"name": "jsonl", "path": write("b.jsonl", GSM8K), "prompt": "{question}", "verifier": "gsm8k"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_config(task=task)))
    assert main(["data", str(tmp_path / "config.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "lengths in tokens" in printed and "verifier      gsm8k" in printed


def test_every_solution_is_judged_and_the_failing_ones_are_named(write):
    rows = [{"prompt": f"{n}?", "answer": str(n), "says": str(n - n % 7 // 5)} for n in range(40)]
    file = write("a.jsonl", rows).removesuffix("a.jsonl") + "task.py"
    with open(file, "w") as task:
        task.write(
            f"rows = {rows}\n"
            "def dataset(split): return rows[:30] if split == 'train' else rows[30:]\n"
            "def solution(row): return row['says'] if int(row['answer']) % 2 else None\n"
            "def verify(response, row):\n"
            "    if row['answer'] == '5': raise ValueError('not this one')\n"
            "    return float(response == row['answer'])\n"
        )
    summary = describe_task(tasks.get("python", file=file))
    fails = [n for n in range(1, 40, 2) if n % 7 // 5 or n == 5]
    train = summary["train"]
    assert (train["with_solution"], train["solution_fails"]) == (15, sum(n < 30 for n in fails))
    assert summary["heldout"]["solution_fails"] == sum(n >= 30 for n in fails)
    assert train["first_failing"] == [
        f"row 5: infrastructure (verifier raised ValueError: not this one ({file}, line 5))",
        *(f"row {n}: wrong (reward 0)" for n in fails[1:5] if n < 30),
    ]
    shown = "\n".join(description_lines(summary))
    assert f"solution fails: train row {fails[1]}: wrong (reward 0)" in shown
    assert f"solution fails: held-out row {next(n for n in fails if n >= 30) - 30}: wrong" in shown
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.skipif(bool(WHY_NOT), reason=f"no bubblewrap here: {WHY_NOT}")
def test_programs_that_rows_bring_are_run(write):
    tests = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "3\n"]}
    bodies = ["print(int(input()) + 1)", "print(int(input()) + 2)", "print(2)"]
    rows = [{"problem": f"{n}.", "tests": tests, "solution": body} for n, body in enumerate(bodies)]
    summary = describe_task(tasks.get("code", heldout=write("a.json", rows)))
    assert summary["heldout"]["solution_fails"] == 2
    assert summary["heldout"]["first_failing"] == [
        "row 1: wrong (test 1: wrong output)",
        "row 2: wrong (test 2: wrong output)",
    ]


def test_what_is_judged_is_what_decoding_the_encoded_solution_gives(write, capsys, tmp_path, run_config):
    """A tokenizer may have the tags as special tokens, or lack a letter."""
    from lpo_jax.models.hf import save_hf

    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer))
    save_hf(tmp_path / "tags", config, random_params(config), tokenizer)
    file = tmp_path / "task.py"
    file.write_text(
        "def dataset(split):\n"
        "    first, count = {'train': (0, 8), 'heldout': (10, 2)}[split]\n"
        "    return [{'prompt': f'q{n}', 'answer': 'X' if n == 3 else '7'} for n in range(first, first + count)]\n"
        "def solution(row): return f\"<answer>{row['answer']}</answer>\"\n"
        "def verify(response, row): return float(response == solution(row))\n"
    )
    values = run_config(model={"path": str(tmp_path / "tags")}, task={"name": "python", "file": str(file)})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["data", str(tmp_path / "config.yaml"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["solution"], summary["verdict"]["outcome"]) == ("<answer>7</answer>", "pass")
    assert summary["train"]["first_failing"] == ["row 3: wrong (reward 0)"]  # the tokenizer has no X


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mth"], "mth: neither a config file nor a task; the tasks are arithmetic"),
        (["math"], "task math needs the option 'path'"),
        (["math", "--task.path=none.json"], "none.json: No such file"),
        (["math", "--task.pth=a.json"], "no option 'pth'; did you mean 'path'"),
    ],
)
def test_command_mistakes(capsys, arguments, message):
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
