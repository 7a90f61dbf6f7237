"""Training with `sampling.ahead`: resumes with rows in flight, bounded staleness, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from whole_runs import assert_same_run, learned, start, wait_for_step

from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.parallel import hosts
from lpo_jax.runs.checkpoint import Checkpoints
from lpo_jax.training.check import check_config
from lpo_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("no_plots")

AHEAD = {"ahead": 1, "max_tokens": 24, "max_rows": 6}


def steps_of(results):
    return [row for row in results[1] if "lpo/staleness_max" in row]


def test_resume_with_rows_in_flight_is_exact(run_config, one_layout):
    whole = run_config("whole", sampling=AHEAD)
    train(parse_config(whole))
    train(parse_config(run_config("parts", sampling=AHEAD, training={"steps": 2})))
    with Checkpoints(Path(run_config("parts")["output"], "checkpoints"), read_only=True) as checkpoints:
        (later,) = checkpoints.record(2)["in_flight"]
    assert later["step"] == 3 and len(later["ids"]) == 4
    parts = run_config("parts", sampling=AHEAD)
    train(parse_config(parts), resume=True)
    assert_same_run(learned(parts), learned(whole))
    steps = steps_of(learned(whole))
    assert [row["lpo/staleness_max"] for row in steps] == [0, 1, 1, 1]
    assert all(0 < row["lpo/stale_token_fraction"] < 1 for row in steps[1:])
    assert all(row["lpo/staleness_mean"] == row["lpo/stale_token_fraction"] for row in steps)
    assert json.loads(Path(whole["output"], "run.json").read_text())["behaviour"]["choice"] == "sampled"


@pytest.mark.slow
def test_killed_run_with_rows_in_flight_goes_on_exactly(run_config, one_layout, tmp_path):
    whole = run_config("whole", sampling=AHEAD)
    train(parse_config(whole))
    config = run_config(sampling=AHEAD)
    process = start(config, tmp_path / "config.yaml")
    wait_for_step(config, 2, process)
    process.kill()
    process.communicate()
    again = start(config, tmp_path / "config.yaml", "--resume")
    assert again.wait(240) == 0, again.communicate()[0]
    assert_same_run(learned(config), learned(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"sampling": AHEAD | {"ahead": 2}},
        {"objective": {"name": "grpo", "token_weight": "truncated-importance"}},
        {"objective": {"name": "grpo"}, "training": {"updates_per_step": 1}},
    ],
)
def test_methods_learn_from_stale_tokens(run_config, one_layout, sections):
    config = run_config(**({"sampling": AHEAD} | sections))
    train(parse_config(config))
    steps, most = steps_of(learned(config)), config["sampling"]["ahead"]
    ages = [row["lpo/staleness_max"] for row in steps]
    assert ages[0] == 0 < ages[-1] and all(age <= min(i, most) for i, age in enumerate(ages))
    assert all(np.isfinite(row["actor/grad_norm"]) and row["actor/grad_norm"] > 0 for row in steps)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "dapo"}}, "dynamic-sampling"),
        ({"training": {"behaviour": "rescored"}}, "behaviour=sampled"),
    ],
)
def test_what_needs_a_finished_round_is_refused(run_config, sections, message):
    with pytest.raises(UserError, match=f"sampling.ahead.*{message}"):
        check_config(parse_config(run_config(sampling=AHEAD, **sections)))


def test_several_processes_are_refused(run_config, monkeypatch):
    monkeypatch.setattr(hosts, "many", lambda: True)
    with pytest.raises(UserError, match="several processes; set sampling"):
        check_config(parse_config(run_config(sampling=AHEAD)))
