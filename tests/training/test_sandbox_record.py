"""Code tasks in a run are refused, or the sandbox is recorded and announced, depending on what is available."""

import json
from pathlib import Path

import pytest
from tiny import run_values

from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.rewards import sandbox
from lpo_jax.training.intro import sandbox_line
from lpo_jax.training.loop import train


@pytest.fixture
def values(tmp_path, tiny_model, monkeypatch):
    """The config of a code task with held-out evaluation only, on a machine where bubblewrap does not work."""
    monkeypatch.setattr(sandbox, "why_not", lambda kind: "no namespaces" if kind == "bubblewrap" else "")
    tests = {"inputs": ["1"], "outputs": ["1"]}
    rows = [{"question": f"say {n}", "tests": tests} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "jsonl", "path": str(tmp_path / "rows.jsonl"), "prompt": "{question}", "verifier": "code"}
    values = run_values(tmp_path / "run", tiny_model, None)
    values["task"] = task
    values["training"] |= {"steps": 0}
    return values


def test_a_code_task_is_refused_before_anything_is_written(values):
    with pytest.raises(UserError, match=r"no namespaces.*rewards\.allow_weak_sandbox"):
        train(parse_config(values))
    assert not Path(values["output"]).exists()


def test_a_package_that_is_not_installed_is_refused_before_anything_is_written(values):
    values["task"]["verifier_options"] = {"packages": ["no_such_package"]}
    with pytest.raises(UserError, match=r"task\.verifier_options\.packages names 'no_such_package'"):
        train(parse_config(values))
    assert not Path(values["output"]).exists()


def test_the_weak_sandbox_is_in_the_runs_record(values, capsys):
    values["rewards"]["allow_weak_sandbox"] = True
    train(parse_config(values))
    record = json.loads(Path(values["output"], "run.json").read_text())
    assert record["sandbox"] == "weak" and record["kind"] == "train"
    assert "sandbox  weak (rewards.allow_weak_sandbox)" in "".join(capsys.readouterr())


def test_only_runs_of_programs_have_a_sandbox():
    assert sandbox_line("") == []
    assert sandbox_line("bubblewrap") == ["sandbox  bubblewrap"]
