"""Supervised steps: before RL, and `lpo sft`."""

from pathlib import Path

import chex
import pytest
from whole_runs import assert_same_run, learned

from lpo_jax.config import parse_config
from lpo_jax.reporting import RunWriter, read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.training import loop
from lpo_jax.training import sft as training_sft
from lpo_jax.training.loop import train
from lpo_jax.training.sft import sft

pytestmark = pytest.mark.usefixtures("no_plots")


WARM = {"batch_size": 8, "learning_rate": 1e-2}


class Killed(BaseException):
    """Ends a run like kill -9: nothing is saved."""


@pytest.mark.slow
def test_a_kill_after_the_warm_start_keeps_the_cold_model(run_config, one_layout, monkeypatch, capsys):
    """The resumed run repeats the evaluation at step 0, but keeps that of the cold model, which is also at step 0."""
    sections = {"warm_start": {**WARM, "steps": 2, "only_below": 0.9}, "training": {"steps": 1}}
    whole, parts = (run_config(name, **sections, evaluation={"problems": 4}) for name in ("whole", "parts"))
    train(parse_config(whole))
    table = evaluations(capsys)
    write, seen = RunWriter.write, []

    def killed(self, step, row):
        write(self, step, row)
        seen.extend(name for name in row if name.endswith("pass@1"))
        if len(seen) == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunWriter, "write", killed)
        train(parse_config(parts))
    train(parse_config(parts), resume=True)
    assert_same_run(learned(parts), learned(whole))
    assert evaluations(capsys) == table and len(table) == 3


def evaluations(capsys):
    """Return the printed rows of the table of evaluations at the end of a run."""
    starts = ("cold model", "before", "after")
    return [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(starts)]


@pytest.mark.slow
def test_warm_start_then_rl(run_config, capsys):
    warm = {**WARM, "steps": 6, "only_below": 0.9}
    config = run_config(warm_start=warm, training={"steps": 1})
    train(parse_config(config))
    rows = read_metrics(Path(config["output"]) / "warm_start")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] / 2
    output = capsys.readouterr().out
    assert "warm-started with 6 supervised steps" in output
    assert "cold model" in output and "before" in output and "after 1 steps" in output


@pytest.mark.slow
def test_rl_does_not_begin_with_the_rows_just_taught(run_config, one_layout, monkeypatch):
    """Of 24 rows, a supervised update uses 8, and the first four steps of 4 prompts sample the other 16."""
    taught, asked = [], []
    batch, record = training_sft.supervised_batch, loop.make_batch
    monkeypatch.setattr(
        training_sft,
        "supervised_batch",
        lambda session, rows: taught.extend(row["n"] for row in rows) or batch(session, rows),
    )
    monkeypatch.setattr(
        loop, "make_batch", lambda rollouts, *args: asked.extend(rollouts.ids) or record(rollouts, *args)
    )
    warm = {**WARM, "steps": 1, "only_below": 1.0}
    train(parse_config(run_config(warm_start=warm, training={"steps": 4}, evaluation={"every": 0})))
    assert len(taught) == 8 and sorted(taught + asked) == list(range(24))


def test_no_warm_start_where_the_cold_model_succeeds(run_config, capsys):
    warm = {"steps": 6, "batch_size": 8, "only_below": 0.0}
    config = run_config(warm_start=warm, training={"steps": 0})
    train(parse_config(config))
    assert not (Path(config["output"]) / "warm_start").exists()
    assert "no warm start" in capsys.readouterr().out


def test_sft_learns_and_resumes_exactly(run_config, one_layout):
    def config(output, steps):
        warm = {**WARM, "steps": steps}
        return run_config(output=output, warm_start=warm, evaluation={"every": 0, "problems": 4})

    whole = config("whole", 4)
    sft(parse_config(whole))
    losses = [row["train/loss"] for row in read_metrics(whole["output"]) if "train/loss" in row]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    sft(parse_config(config("parts", 2)))
    sft(parse_config(config("parts", 4)), resume=True)
    chex.assert_trees_all_equal(
        *(load_run(config(name, 4)["output"], "latest")[0].params for name in ("whole", "parts"))
    )
