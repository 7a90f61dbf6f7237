"""Resumed, killed and damaged runs of the real training loop on a tiny model go on exactly."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import yaml
from tiny import run_values
from whole_runs import assert_same_run, learned, pad_groups, skip_plots, start, wait_for_step

from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.reporting import RunWriter, read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.runs.compiles import watch
from lpo_jax.runs.signals import Interrupted
from lpo_jax.sampling import calls
from lpo_jax.sampling import decode as device
from lpo_jax.training import step
from lpo_jax.training.loop import train
from lpo_jax.training.session import Session

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_model, tiny_task):
    """The results of an uninterrupted run of four steps."""
    values = run_values(tmp_path_factory.mktemp("reference") / "run", tiny_model, tiny_task)
    with pytest.MonkeyPatch.context() as patch:
        pad_groups(patch)
        skip_plots(patch)
        train(parse_config(values))
    return learned(values)


def test_learns_and_leaves_a_complete_record(reference):
    _, metrics, rollouts = reference
    steps = [row for row in metrics if "critic/score/mean" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[-1]["critic/score/mean"] > steps[0]["critic/score/mean"] + 0.1
    np.testing.assert_array_less(max(row["lpo/logp_gap_max"] for row in steps), 2e-4)
    np.testing.assert_array_less(max(abs(row["lpo/coef_sum"]) for row in steps), 1e-5)
    evaluations = [row for row in metrics if "val-core/python/acc/pass@1" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    responses = [json.loads(line) for line in rollouts["rollouts/3.jsonl"].splitlines()]
    assert len(responses) == 16
    for group in range(4):
        rows = responses[4 * group : 4 * group + 4]
        assert len({row["input"] for row in rows}) == 1 and [row["k"] for row in rows] == [0, 1, 2, 3]
        assert sum(row["target"] for row in rows) == pytest.approx(1, abs=1e-5)
        assert sum(row["policy"] for row in rows) == pytest.approx(1, abs=1e-5)
        assert sum(row["coefficient"] for row in rows) == pytest.approx(0, abs=1e-5)
        best = max(rows, key=lambda row: row["score"])
        assert best["target"] == max(row["target"] for row in rows)


def test_resume_is_exact(reference, run_config, one_layout):
    """Also beside a checkpoint that was half written when the run was killed."""
    train(parse_config(run_config(training={"steps": 2})))
    half = Path(run_config()["output"], "checkpoints", "3.orbax-checkpoint-tmp-1")
    half.mkdir()
    (half / "state").write_text("half of it")
    config = run_config(training={"steps": 4})
    train(parse_config(config), resume=True)
    assert_same_run(learned(config), reference)


def test_a_run_and_its_resume_compile_each_program_once(run_config, one_layout, monkeypatch):
    """jax compiles again for the same shapes if an array is bound to its device in one call and free in another."""
    step.update.clear_cache()
    device.decode.clear_cache()
    monkeypatch.setattr(calls, "FEWEST", 2)  # several calls to sample a round
    names, shapes = [], set()

    def decode(*arguments, run=device.decode):
        shapes.add(str(jax.tree.map(np.shape, arguments[1:])))
        return run(*arguments)

    monkeypatch.setattr(device, "decode", decode)
    with watch(lambda name, seconds: names.append(name)):
        for steps in (1, 2):
            config = run_config(training={"steps": steps}, evaluation={"every": 0, "problems": 4})
            train(parse_config(config), resume=steps == 2)
            assert names.count("update") == 1
            assert names.count("decode") == len(shapes)


ROUNDED = {"sampling": {"kv_dtype": "int8"}, "optimizer": {"state": "bfloat16"}}


@pytest.mark.parametrize(
    ("whole", "parts"),
    [
        # Moments wait in the memory of the host, and are read to that of the device first in a resume.
        pytest.param({}, {"optimizer": {"state": "host"}}, id="moments-on-the-host", marks=pytest.mark.slow),
        pytest.param(ROUNDED, ROUNDED, id="8-bits-and-rounded-moments"),
    ],
)
def test_two_parts_equal_the_whole(run_config, one_layout, whole, parts):
    ends = []
    for output, stops, sections in (("whole", (2,), whole), ("parts", (1, 2), parts)):
        for steps in stops:
            evaluation = {"every": 0, "problems": 4}
            config = run_config(output, training={"steps": steps}, evaluation=evaluation, **sections)
            train(parse_config(config), resume=steps > stops[0])
        params, metrics, files = learned(config)  # the first part ends with an evaluation of its own
        steps = [row for row in metrics if "training/global_step" in row]
        ends.append((params, steps, {name: text for name, text in files.items() if "rollouts" in name}))
    assert len(ends[0][1]) == len(ends[0][2]) == 2
    assert_same_run(*ends)


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))],
)
def test_killed_run_goes_on_exactly(reference, run_config, one_layout, tmp_path, number):
    config = run_config(training={"save_plots": False})
    process = start(config, tmp_path / "config.yaml")
    wait_for_step(config, 1, process)
    time.sleep(
        random.random() / 4
    )  # the rest of the run takes longer; a signal after its end would kill Python
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    if number != signal.SIGKILL and "finished" not in output:
        assert "--resume" in output or "lpo export" in output  # stopped by the signal, or already done
        assert process.returncode == (130 if "--resume" in output else 0), output
    if number == signal.SIGKILL:
        train(parse_config(config), resume=True)  # this process has the programs
    else:
        again = start(config, tmp_path / "config.yaml", "--resume")
        output = again.communicate(timeout=240)[0]
        assert again.returncode == 0, output
    assert_same_run(learned(config), reference)


def test_finished_run_resumes_to_its_report(run_config, one_layout, capsys):
    config = run_config(training={"steps": 1}, evaluation={"problems": 4})
    train(parse_config(config))
    before = learned(config)
    train(parse_config(config), resume=True)
    assert_same_run(learned(config), before)
    assert "lpo export" in capsys.readouterr().out


def test_best_checkpoint_is_kept(run_config, one_layout):
    config = run_config(training={"steps": 4}, checkpoint={"every": 1, "keep": 1}, evaluation={"every": 1})
    train(parse_config(config))
    scores = {
        row["step"]: row["val-core/python/acc/pass@1"]
        for row in read_metrics(config["output"])
        if "val-core/python/acc/pass@1" in row and row["step"] > 0
    }
    model, best = load_run(config["output"], "best")
    assert scores[best] == max(scores.values())
    assert load_run(config["output"], "latest")[1] == 4
    chex.assert_tree_all_finite(model.params)


def best(config):
    """Load a run's best checkpoint; returns its step and parameters."""
    model, step = load_run(config["output"], "best")
    return step, model.params


@pytest.mark.parametrize(
    "moment", [pytest.param("while it samples", marks=pytest.mark.slow), "as its row is written"]
)
def test_best_checkpoint_survives_sigterm_in_its_evaluation(run_config, one_layout, monkeypatch, moment):
    """The step is saved before or after its evaluation; in both cases its score is kept."""
    sections = {"training": {"steps": 3}, "checkpoint": {"every": 0, "keep": 1}, "evaluation": {"every": 1}}
    whole, parts = (run_config(name, **sections) for name in ("whole", "parts"))
    evaluate, write, signals = Session.evaluate, RunWriter.write, []

    def second_is_best(self, *arguments):
        step = len(list(Path(self.config.output, "rollouts").glob("*.jsonl")))
        if signals and moment == "while it samples" and step == 2:
            os.kill(os.getpid(), signals.pop())
        of = evaluate(self, *arguments)
        score = of.summary["score"] | {"mean": float(step == 2)}
        return dataclasses.replace(of, summary=of.summary | {"score": score})

    def write_signalled(self, step, row):
        write(self, step, row)
        if signals and moment == "as its row is written" and step == 2 and "timing_s/testing" in row:
            os.kill(os.getpid(), signals.pop())

    monkeypatch.setattr(Session, "evaluate", second_is_best)
    monkeypatch.setattr(RunWriter, "write", write_signalled)
    train(parse_config(whole))
    signals.append(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(parse_config(parts))
    assert not signals and load_run(parts["output"], "latest")[1] == 2
    train(parse_config(parts), resume=True)
    assert_same_run(learned(parts), learned(whole))
    assert best(parts)[0] == best(whole)[0] == 2
    chex.assert_trees_all_equal(best(parts)[1], best(whole)[1])


@pytest.mark.parametrize(
    ("section", "keys", "difference"),
    [
        ("training", {"prompts_per_step": 8}, "training.prompts_per_step = 8; the run was started with 4"),
        ("sampling", {"num_responses": 2}, "sampling.num_responses = 2; the run was started with 4"),
        ("objective", {"name": "grpo"}, "objective.name = 'grpo'; the run was started with 'lpo-forward'"),
    ],
)
def test_changed_settings_are_refused_by_name(run_config, section, keys, difference):
    train(parse_config(run_config(training={"steps": 0}, evaluation={"problems": 4})))
    before = sorted(Path(run_config()["output"]).rglob("*"))
    with pytest.raises(UserError, match=f"cannot resume with {difference}"):
        train(parse_config(run_config(**{section: keys})), resume=True)
    assert sorted(Path(run_config()["output"]).rglob("*")) == before


def test_another_run_is_not_overwritten(run_config):
    config = run_config(training={"steps": 0}, evaluation={"problems": 4})
    train(parse_config(config))
    with pytest.raises(UserError, match="holds a run already; continue it with --resume"):
        train(parse_config(config))


@pytest.mark.slow
def test_full_disk_keeps_the_checkpoint_before(run_config, tmp_path):
    """A save that exceeds the file-size limit stops the run; the previous checkpoint is intact."""
    config = run_config(training={"steps": 2}, evaluation={"every": 0, "problems": 4})
    train(parse_config(config))
    good = learned(config)[0]
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(run_config(training={"steps": 4}, evaluation={"problems": 4}))
    )
    limited = (
        "import resource, sys; from lpo_jax.commands.main import main; import lpo_jax.runs.checkpoint as c\n"
        "save = c.Checkpoints.save\n"
        "def full(*args, **kwargs):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    return save(*args, **kwargs)\n"
        "c.Checkpoints.save = full\n"
        f"sys.exit(main(['train', {str(tmp_path / 'config.yaml')!r}, '--resume']))"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "could not be saved" in done.stderr and "the one of step 2 is intact" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("lpo: ")
    assert load_run(config["output"], "latest")[1] == 2
    chex.assert_trees_all_equal(load_run(config["output"], "latest")[0].params, good)
