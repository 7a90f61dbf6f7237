"""Whole runs of the real training loop on a tiny model: equivalences, programs and failures."""

import json

import chex
import jax
import numpy as np
import pytest
from whole_runs import learned

from lpo_jax import objectives
from lpo_jax.config import parse_config
from lpo_jax.errors import RunStopped
from lpo_jax.models import runner
from lpo_jax.reporting import read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.sampling import decode as sampling
from lpo_jax.sampling import kv_cache
from lpo_jax.training import learner, loop, step
from lpo_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("no_plots")

# A large epsilon makes Adam smooth in the gradient, so that rounding errors do not grow over several steps.
SMOOTH = {"learning_rate": 1e-2, "eps": 1e-1}


@pytest.mark.slow
def test_no_drift_at_learning_rate_zero(run_config, run_params):
    config = run_config(
        optimizer={"learning_rate": 0.0}, training={"steps": 20}, evaluation={"every": 0, "problems": 4}
    )
    train(parse_config(config))
    params, metrics, _ = learned(config)
    chex.assert_trees_all_equal(params, jax.tree.map(np.asarray, run_params))
    steps = [row for row in metrics if "lpo/logp_gap_max" in row]
    assert len(steps) == 20
    np.testing.assert_array_less(max(row["lpo/logp_gap_max"] for row in steps), 2e-4)
    np.testing.assert_array_less(max(row["lpo/score_abs_max"] for row in steps), 2e-4)


@pytest.mark.slow
def test_lpo_reverse_on_policy_is_grpo(run_config):
    """With one update per round both methods have the same learning curve up to rounding (the LPO paper, E.4)."""
    curves = {}
    for name in ("lpo-reverse", "grpo"):
        config = run_config(
            output=name, objective={"name": name}, training={"updates_per_step": 1}, optimizer=SMOOTH
        )
        train(parse_config(config))
        curves[name] = learned(config)
    rewards = [[row.get("critic/score/mean") for row in metrics] for _, metrics, _ in curves.values()]
    assert rewards[0] == rewards[1]
    chex.assert_trees_all_close(curves["grpo"][0], curves["lpo-reverse"][0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_memory_and_scoring_settings_do_not_change_what_is_learned(run_config):
    ends = []
    for number, settings in enumerate(
        [{}, {"behaviour": "rescored"}, {"remat": False, "token_budget": 4096}]
    ):
        config = run_config(
            output=str(number), training=settings, optimizer=SMOOTH, evaluation={"problems": 4}
        )
        train(parse_config(config))
        params, metrics, _ = learned(config)
        ends.append(params)
        gaps = [row["lpo/logp_gap_max"] for row in metrics if "lpo/logp_gap_max" in row]
        assert max(gaps) > 0
        np.testing.assert_array_less(max(gaps), 2e-4)
    chex.assert_trees_all_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(ends[0], ends[2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_trains(run_config):
    config = run_config(training={"steps": 2})
    config["model"]["dtype"] = "bfloat16"
    train(parse_config(config))
    params, metrics, _ = learned(config)
    assert params["embed"].dtype == np.float32  # master weights
    rows = [row for row in metrics if "lpo/logp_gap_max" in row]
    largest, mean = (max(row[f"lpo/logp_gap_{of}"] for row in rows) for of in ("max", "mean"))
    assert 1e-4 < largest < 0.5  # of one token, so that it has less of a margin than the mean
    np.testing.assert_array_less(mean, 0.1)


@pytest.mark.slow
def test_ragged_prompts_compile_a_stated_number_of_programs(run_config, monkeypatch):
    """There is one program per padded size: one for prompts, one for responses and a few for packed rows."""
    for module, name, static, donated, most in (
        (step, "update", (0, 1), (2,), 6),
        (runner, "score", (0,), (), 6),
        (kv_cache, "prefill", (0, 1, 2, 3), (), 1),
        (sampling, "decode", (0,), (5,), 1),
    ):
        counted = chex.assert_max_traces(getattr(module, name).__wrapped__, n=most)
        jitted = jax.jit(counted, static_argnums=static, donate_argnums=donated)
        monkeypatch.setattr(module, name, jitted)
        if module in (step, runner):
            monkeypatch.setattr(learner, name, jitted)
    train(parse_config(run_config(evaluation={"problems": 8})))


class NotFinite(objectives.get("grpo").__class__):
    """A method whose gradient is always NaN."""

    def __call__(self, stats, scored):
        loss, metrics = super().__call__(stats, scored)
        return loss * float("nan"), metrics


def test_stops_after_several_gradients_that_are_not_finite(run_config, one_layout, run_params, monkeypatch):
    broken = NotFinite(**vars(objectives.get("grpo")))
    monkeypatch.setattr(loop, "check_config", lambda config: broken)
    config = run_config(training={"max_skipped_updates": 4}, checkpoint={"every": 1})
    with pytest.raises(RunStopped, match="the last 4 gradients were not finite"):
        train(parse_config(config))
    rows = [row for row in read_metrics(config["output"]) if "lpo/skipped_updates" in row]
    assert [row["lpo/skipped_updates"] for row in rows] == [2, 2]
    chex.assert_trees_all_equal(load_run(config["output"], "latest")[0].params, run_params)


def test_failing_verifier_masks_its_sample(run_config, one_layout, tmp_path, tiny_task):
    """Responses whose verifier hangs, dies or raises are masked and counted; they are not scored 0."""
    task = tmp_path / "failing.py"
    failing = """
import os, time

def verify(response, row):
    kind = ord((response + "?")[0]) % 5 if row["n"] < 100 else 3  # held-out responses are judged
    if kind == 0:
        time.sleep(60)
    if kind == 1:
        os._exit(3)
    if kind == 2:
        raise ValueError("no idea")
    return Verdict(len(set(response)) / 6, "wrong")
"""
    task.write_text(tiny_task.read_text() + failing)
    config = run_config(
        task={"name": "python", "file": str(task)},
        rewards={"workers": 2, "timeout": 0.3},
        training={"steps": 1},
        evaluation={"every": 0, "problems": 4},
    )
    train(parse_config(config))
    _, metrics, rollouts = learned(config)
    rows = [json.loads(line) for line in rollouts["rollouts/1.jsonl"].splitlines()]
    masked = [row for row in rows if row["outcome"] == "infrastructure"]
    reasons = " ".join(row["parts"]["reason"] for row in masked)
    assert "wall-clock limit" in reasons and "died" in reasons and "ValueError: no idea" in reasons
    assert all(
        row["target"] == row["policy"] == row["coefficient"] == 0 and not row["valid"] for row in masked
    )
    row = next(row for row in metrics if "actor/pg_loss" in row)
    assert row["reward/outcome/infrastructure"] == pytest.approx(len(masked) / len(rows))
    judged = [sum(r["outcome"] != "infrastructure" for r in rows[i : i + 4]) for i in range(0, len(rows), 4)]
    alone = judged.count(1)  # a group of one response is left out
    assert row["lpo/masked_response_frac"] == pytest.approx((len(masked) + alone) / len(rows))
    assert row["critic/score/min"] > 0  # masked responses do not count as 0
