"""`lpo eval --suite`: scores against closed forms, and resuming an evaluation that was killed."""

import json
import math

import jax
import numpy as np
import pytest
from tiny import CONFIG, character_tokenizer

from lpo_jax import load_model
from lpo_jax.commands.evaluation_files import weights_hash
from lpo_jax.commands.main import main
from lpo_jax.errors import UserError
from lpo_jax.evaluation import suite as S
from lpo_jax.evaluation.metrics import majority
from lpo_jax.evaluation.responses import ResponseFile, ResponseSummary
from lpo_jax.models.hf import save_hf
from lpo_jax.tasks.benchmarks import Benchmark

NINE = [{"q": f"{n}+{n}=", "answer": 2 * n} for n in range(1, 10)]


def summaries(*outcomes, answers=None):
    answers = answers or ["x"] * len(outcomes)
    return [
        ResponseSummary(o, a, float(o == "pass"), 10, o != "malformed") for o, a in zip(outcomes, answers)
    ]


def test_scores_match_closed_forms():
    # Problem 1: one of four passes. Problem 2: none passes, and the verifier failed on one.
    result = S.score_responses(
        summaries("pass", "wrong", "wrong", "wrong", "wrong", "malformed", "wrong", "infrastructure"), 4
    )
    assert result["pass@1"]["mean"] == (1 / 4 + 0) / 2
    assert result["pass@2"]["mean"] == (1 / 2 + 0) / 2
    assert result["pass@4"]["mean"] == 1.0 and result["pass@4"]["problems"] == 1
    assert (result["truncated"], result["malformed"], result["invalid_samples"]) == (1 / 8, 1 / 8, 1)
    assert result["mean_reward"] == pytest.approx(1 / 7)
    assert S.score_responses(summaries(*["wrong"] * 6), 6)["ks"] == [1, 2, 4, 6]  # K is included


@pytest.mark.parametrize(
    ("answers", "passed", "valid", "right"),
    [
        (["7", " 7 ", "8", "9"], [1, 1, 0, 0], [1, 1, 1, 1], 1.0),
        (["8", "7", "8", "7"], [0, 1, 0, 1], [1, 1, 1, 1], 0.0),  # a tie: the first answer wins
        (["7", "8", None, None], [1, 0, 0, 0], [1, 1, 1, 1], 1.0),  # None does not vote
        (["8", "8", "7", "7"], [0, 0, 1, 1], [0, 0, 1, 1], 1.0),  # invalid samples do not vote
        ([None, "", None, None], [0, 0, 0, 0], [1, 1, 1, 1], 0.0),
        (["7", "7", "7", "7"], [1, 1, 1, 1], [0, 0, 0, 0], math.nan),
    ],
)
def test_majority(answers, passed, valid, right):
    other = ["1", "1", "1", "1"]  # without any vote the result is NaN
    votes = majority(np.array([passed, [0] * 4], bool), np.array([valid, [1] * 4], bool), [answers, other])
    np.testing.assert_array_equal(votes, [right, 0.0])


def test_without_answers_there_is_no_majority():
    result = S.score_responses(summaries("pass", "wrong", answers=[None, None]), 2)
    assert math.isnan(result["maj@2"]["mean"]) and result["maj@2"]["problems"] == 0
    assert result["pass@2"]["mean"] == 1.0


def record(n, K=2):
    return {
        "id": n // K, "k": n % K, "output": "\ud83d \x00", "score": 1.0, "outcome": "pass",
        "parts": {"answer": str(n), "value": math.nan}, "tokens": n, "finished": True,
    }  # fmt: skip


def test_a_file_of_responses_keeps_whole_batches(tmp_path):
    path = tmp_path / "r.jsonl"
    open_file = lambda: ResponseFile(path, problems=5, num_responses=2, batch=2)  # noqa: E731
    with open_file() as file:
        file.append([record(n) for n in range(4)])
        file.append([record(n) for n in range(4, 8)])
        file.append([record(n) for n in range(8, 10)])  # the last batch is smaller
        whole = file.summaries
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for cut in [0, 1, len(lines[0]), len(data) // 2, len(data) - 1, len(data)]:
        path.write_bytes(data[:cut])
        kept = data[:cut].count(b"\n")
        kept = 10 if kept == 10 else kept // 4 * 4
        with open_file() as file:
            assert file.summaries == whole[:kept] and file.problems == kept // 2
        assert path.read_bytes() == b"".join(lines[:kept])
    path.write_bytes(b"".join([lines[1], *lines[1:]]))  # out of order
    with pytest.raises(UserError, match=r"r\.jsonl line 1 is damaged"):
        open_file()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "nine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in NINE))
    return str(path)


@pytest.fixture
def arguments(tiny_model, data):
    def make(out, *more):
        jsonl = ["--task", "jsonl", '--task.prompt="{q}"', "--task.verifier=arithmetic"]
        sampling = ["--num_responses=3", "--max_tokens=8", "--batch=4", "--temperature=1"]
        return ["eval", str(tiny_model), "--suite", data, *jsonl, *sampling, "--out", str(out), *more]

    return make


def written(out):
    files = sorted(path for path in out.rglob("*.json*"))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_killed_and_resumed_is_the_same(arguments, tmp_path, capsys, monkeypatch):
    assert main(arguments(tmp_path / "whole")) == 0
    table = capsys.readouterr().out
    assert "pass@1 (avg@k)" in table and "maj@k" in table
    whole = written(tmp_path / "whole")
    rows = [json.loads(line) for line in whole["responses/nine.jsonl"].splitlines()]
    # All 9 rows, although 9 is not a multiple of 4, and each response with its prompt.
    assert [(row["id"], row["k"], row["input"]) for row in rows] == [
        (n, k, NINE[n]["q"]) for n in range(9) for k in range(3)
    ]
    assert len({row["output"] for row in rows}) > 9
    summary = json.loads(whole["summary.json"])
    assert summary["benchmarks"]["nine"]["samples"] == 27 and summary["pass@1"] is not None

    append, batches = ResponseFile.append, []

    def killed(self, records):
        if len(batches) == 1:  # while the second batch is written
            self._file.write(b'{"id": 4, "k": 0, "out')
            raise KeyboardInterrupt
        batches.append(append(self, records))

    monkeypatch.setattr(ResponseFile, "append", killed)
    assert main(arguments(tmp_path / "cut")) == 130
    assert not (tmp_path / "cut/summary.json").exists()
    monkeypatch.setattr(ResponseFile, "append", append)
    capsys.readouterr()
    assert main(arguments(tmp_path / "cut")) == 0
    assert written(tmp_path / "cut") == whole
    assert capsys.readouterr().out == table.replace("whole", "cut")

    # A finished evaluation is only read; other settings or data are another evaluation.
    assert main(arguments(tmp_path / "cut", "--json")) == 0
    assert json.loads(capsys.readouterr().out) == summary
    for option, says in (
        ("--seed=1", "settings.seed = 0 and not 1"),
        ("--num-responses=2", "benchmarks.nine.k = 3 and not 2"),
        ("--problems=4", "benchmarks.nine.data"),
        ("--task.verifier=gsm8k", "benchmarks.nine.verifier.source = 'arithmetic' and not 'gsm8k'"),
    ):
        assert main(arguments(tmp_path / "cut", option)) == 2
        error = capsys.readouterr().err
        assert says in error and len(error.splitlines()) == 1
    assert written(tmp_path / "cut") == whole


def test_mistakes(tiny_model, tiny_params, data, arguments, tmp_path, capsys):
    def fails(*arguments):
        assert main(["eval", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    model, empty = str(tiny_model), str(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    assert "unknown suite 'maths'; did you mean 'math'?" in fails(model, "--suite", "maths")
    missing = fails(model, "--suite", "math", "--data_dir", empty)
    assert "math_eval/aime24.jsonl" in missing and "hf:math-ai/aime24" in missing
    assert "no such folder" in fails(model, "--suite", "math", "--data-dir", empty + "/x")
    assert "--task math" in fails(model, "--suite", data)
    assert "requires a data file" in fails(model, "--suite", "math", "--task", "gsm8k")
    assert "--sampling.top_p=1" in fails(model, "--suite", data, "--task=math", "--sampling.top_p=1")
    assert "temperature -1" in fails(model, "--suite", "math", "--temperature=-1")
    assert "--top-p requires --suite" in fails(model, "--top-p=0.9")
    assert "exceeds the 128 positions" in fails(*arguments("x", "--max-prompt-tokens=125")[1:])
    assert "row 0: its prompt has 4 tokens, more than --max-prompt-tokens = 2 (9 such rows)" in fails(
        *arguments("x", "--max-prompt-tokens=2")[1:]
    )
    assert "no chat template" in fails(*arguments("x", "--chat")[1:])
    (tmp_path / "empty/thesis.tex").touch()
    assert "is not empty and holds no evaluation" in fails(*arguments(empty)[1:])
    mute = tmp_path / "mute"
    save_hf(mute, CONFIG, tiny_params, None)
    assert "has no tokenizer" in fails(str(mute), *arguments("x")[2:])


def test_benchmark_names_are_unique_file_names(data):
    twice = [Benchmark("a", 1, {"name": "math", "heldout": data})] * 2
    for benchmarks in (twice, [Benchmark("../a", 1, {})]):
        with pytest.raises(UserError, match="a name is a file name and must be unique"):
            S.prepare_benchmarks(benchmarks, S.Settings(), character_tokenizer(), 2048)


def test_other_weights_have_another_hash(tiny_model):
    model = load_model(str(tiny_model))
    before = weights_hash(model)
    assert weights_hash(load_model(str(tiny_model))) == before
    model.params = jax.tree.map(lambda p: p + 1e-3, model.params)
    assert weights_hash(model) != before


def test_without_a_suite_shared_names_are_config_keys(monkeypatch):
    called = []
    monkeypatch.setattr("lpo_jax.commands.evaluate.evaluate_heldout", lambda *a, **k: called.append(a))
    assert main(["eval", "c.yaml", "--task.n=1", "--seed=3", "--task=math"]) == 0
    assert called == [("c.yaml", ["--task=math", "--seed=3", "--task.n=1"])]
