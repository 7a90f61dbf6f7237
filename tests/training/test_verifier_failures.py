"""A verifier that fails on every response ends a run with its message, file and line; nothing saved is lost."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import VERIFIER

from lpo_jax.commands.main import main
from lpo_jax.reporting import read_metrics

pytestmark = pytest.mark.usefixtures("no_plots")

# Faults of a verifier, and the reported reasons, with the line in the file of the tiny task.
BROKEN = {
    "raises": ("return [][0]", "verifier raised IndexError: list index out of range"),
    "returns a dict": ("return {'reward': 1.0}", "verifier returned dict, not a number or a Verdict"),
    "returns a text": ("return 'pass'", "verifier returned str, not a number or a Verdict"),
    "returns nothing": ("return None", "verifier returned NoneType, not a number or a Verdict"),
}


@pytest.fixture
def broken_task(tmp_path):
    """A task whose verifier runs `fault` on responses that satisfy `when`, as long as the file `broken` exists."""

    def make(fault, when="True"):
        lines = VERIFIER.split("\n")
        at = lines.index("def verify(response, row):")
        condition = f"    if os.path.exists({str(tmp_path / 'broken')!r}) and {when}:"
        lines[at + 1 : at + 1] = [condition, f"        {fault}"]
        lines[0] = "import os"
        (tmp_path / "task.py").write_text("\n".join(lines))
        (tmp_path / "broken").touch()
        raised = not fault.startswith("return") or "[0]" in fault
        return f"({tmp_path / 'task.py'}, line {at + 3 if raised else at + 1})"

    return make


def lpo(capsys, tmp_path, config, command, *arguments):
    """Run the command; returns the exit status and the last line on stderr."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    status = main([command, str(tmp_path / "c.yaml"), *arguments])
    captured = capsys.readouterr()
    return status, captured.err.strip().split("\n")[-1], captured.out


@pytest.mark.parametrize(
    "case", ["raises", *(pytest.param(x, marks=pytest.mark.slow) for x in list(BROKEN)[1:])]
)
def test_the_cold_evaluation_stops(run_config, broken_task, tmp_path, capsys, case):
    fault, says = BROKEN[case]
    place = broken_task(fault)
    config = run_config(task={"name": "python", "file": str(tmp_path / "task.py")})
    for command in ("train", "eval"):
        status, error, _ = lpo(capsys, tmp_path, config, command)
        assert status == 1
        assert error.startswith("lpo: held-out evaluation: the verifier failed on all 24 responses")
        assert f"{says} {place}" in error


def test_a_step_that_stops_is_not_done_and_is_done_later(
    run_config, one_layout, broken_task, tmp_path, capsys
):
    place = broken_task("return [][0]")
    task = {"name": "python", "file": str(tmp_path / "task.py")}
    same = {"evaluation": {"every": 0}, "checkpoint": {"every": 0}, "task": task}
    (tmp_path / "broken").unlink()
    undisturbed = run_config("undisturbed", **same)
    assert lpo(capsys, tmp_path, undisturbed, "train")[0] == 0

    first = run_config(**same, training={"steps": 2})
    assert lpo(capsys, tmp_path, first, "train")[0] == 0
    (tmp_path / "broken").touch()
    config = run_config(**same)
    status, error, _ = lpo(capsys, tmp_path, config, "train", "--resume")
    assert (
        status == 1
        and error.startswith("lpo: step 3: the verifier failed on all 16 responses")
        and place in error
    )
    run = Path(config["output"])
    assert max(row["step"] for row in read_metrics(run)) == 2 and not (run / "rollouts" / "3.jsonl").exists()
    (tmp_path / "broken").unlink()
    with open(tmp_path / "task.py", "a") as task:  # repairing a verifier changes its file
        task.write("\n# repaired\n")
    assert lpo(capsys, tmp_path, config, "train", "--resume")[0] == 0
    for step in (3, 4):
        rollouts = [Path(c["output"], "rollouts", f"{step}.jsonl").read_text() for c in (config, undisturbed)]
        assert rollouts[0] == rollouts[1]


def test_some_failures_are_warned_of_and_masked(run_config, one_layout, broken_task, tmp_path, capsys):
    place = broken_task("raise OSError('gone')", when="len(response) % 3 == 0")
    config = run_config(task={"name": "python", "file": str(tmp_path / "task.py")}, training={"steps": 2})
    status, _, out = lpo(capsys, tmp_path, config, "train")
    warnings = [line for line in out.split("\n") if line.startswith("warning: ")]
    assert status == 0 and len(warnings) == 1 and f"verifier raised OSError: gone {place}" in warnings[0]
    status, error, _ = lpo(capsys, tmp_path, config, "eval")
    assert status == 0 and error.startswith("lpo: warning: held-out evaluation: the verifier failed on")


def test_a_suite_stops_and_asks_anew(tiny_model, broken_task, tmp_path, capsys):
    place = broken_task("return [][0]")
    rows = [{"q": f"say {n}", "answer": "7"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    data = ["--suite", str(tmp_path / "rows.jsonl"), "--task", "jsonl", "--out", str(out), "--batch", "4"]
    task = ["--task.prompt='{q}'", f"--task.verifier={tmp_path / 'task.py'}:verify"]
    command = ["eval", str(tiny_model), *data, *task, "--num-responses", "1", "--max-tokens", "4"]
    assert main(command) == 1
    error = capsys.readouterr().err.strip().split("\n")[-1]
    # It stops after 8 of 12 problems, when a single bad row can be ruled out.
    assert error.startswith("lpo: benchmark rows: the verifier failed on all 8 responses") and place in error
    assert (out / "responses" / "rows.jsonl").read_bytes() == b"" and not (out / "summary.json").exists()
    (tmp_path / "broken").unlink()
    assert main(command) == 0
    assert json.loads((out / "summary.json").read_text())["benchmarks"]["rows"]["problems"] == 12
