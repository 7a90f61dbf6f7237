"""Runs that sample in another precision than they train in: the gap is reported, and the method must correct it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.models import quantize
from lpo_jax.reporting import read_metrics
from lpo_jax.training import learner
from lpo_jax.training.behaviour import choose_behaviour
from lpo_jax.training.check import check_config
from lpo_jax.training.loop import train
from lpo_jax.training.session import open_session

INT8 = {"weights": "int8"}
TRUNCATED = {"name": "dr-grpo", "token_weight": "truncated-importance"}


@pytest.mark.parametrize(
    "sampling, most",
    [
        (INT8, [1.0, 0.15]),
        ({"kv_dtype": "int8"}, [1.0, 0.15]),
        pytest.param({"kv_dtype": "fp8"}, [3.0, 0.5], marks=pytest.mark.slow),
    ],
)
def test_gap_of_sampling_in_8_bits_is_reported(run_config, one_layout, no_plots, sampling, most):
    if sampling is INT8:
        pytest.importorskip("qwix")
    values = run_config(
        sampling=sampling,
        objective=TRUNCATED,
        training={"steps": 1},
        evaluation={"every": 0, "problems": 4},
    )
    train(parse_config(values))
    (row,) = (row for row in read_metrics(values["output"]) if "lpo/logp_gap_max" in row)
    assert row["lpo/logp_gap_max"] > 1e-3 and row["lpo/logp_gap_mean"] > 1e-4
    np.testing.assert_array_less([row["lpo/logp_gap_max"], row["lpo/logp_gap_mean"]], most)
    assert row["actor/grad_norm"] > 0 and row["lpo/skipped_updates"] == 0


def test_what_cannot_be_corrected_is_refused(run_config, monkeypatch):
    def problem(**sections):
        with pytest.raises(UserError) as error:
            check_config(parse_config(run_config(**sections)))
        assert "\n" not in str(error.value)
        return str(error.value)

    sampled = {"behaviour": "sampled"}
    assert "set training.behaviour=rescored" in problem(objective=TRUNCATED, training=sampled)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lpo_jax[quant]'" in problem(sampling=INT8)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: name)
    assert "samples from another model" in problem(sampling=INT8, training=sampled)
    check_config(parse_config(run_config(sampling=INT8, objective=TRUNCATED)))
    cache = {"kv_dtype": "int8"}
    assert problem(sampling=cache, training=sampled).startswith(
        "sampling.kv_dtype = int8 samples from another"
    )
    assert "training.behaviour = rescored replaces" in problem(sampling={**cache, "ahead": 1})


def test_8_bit_floats_need_a_chip_that_has_them(run_config, monkeypatch):
    class Ampere:
        device_kind, compute_capability = "NVIDIA A100-SXM4-80GB", "8.0"

        def memory_stats(self):
            return None

    monkeypatch.setattr("lpo_jax.training.session.jax.local_devices", lambda: [Ampere()])
    values = run_config(sampling={"kv_dtype": "fp8"})
    session = open_session(parse_config(values))
    with pytest.raises(UserError, match=r"^sampling.kv_dtype = fp8: NVIDIA A100.* use int8$"), session:
        pass


def test_a_constant_of_the_method_is_not_the_response_budget(run_config):
    def normaliser(**objective):
        return check_config(parse_config(run_config(objective=objective))).aggregate.max_tokens

    assert normaliser(name="dr-grpo") == 6  # sampling.max_tokens
    assert normaliser(name="nft") == 1000
    assert normaliser(name="nft", max_tokens=50) == normaliser(name="dr-grpo", max_tokens=50) == 50


def chosen(run_config, dtype="float32", **sections):
    config = parse_config(run_config(**sections))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    return choose_behaviour(config, check_config(config)).choice


@pytest.mark.parametrize(
    ("dtype", "updates", "objective", "choice"),
    [
        ("float32", 4, {"name": "gspo"}, "sampled"),
        ("float32", 1, TRUNCATED, "rescored"),
        ("bfloat16", 1, {"name": "gspo"}, "sampled"),
        ("bfloat16", 2, {"name": "gspo"}, "rescored"),
        ("bfloat16", 1, {"name": "pipo"}, "rescored"),  # the replayed batch is a second update
        ("bfloat16", 1, {"name": "copg"}, "rescored"),  # log-ratios to the reference
        ("bfloat16", 1, {"name": "grpo", "kl_coef": 0.1}, "rescored"),
    ],
)
def test_log_probs_are_the_trainer_s_where_the_gap_can_matter(run_config, dtype, updates, objective, choice):
    assert chosen(run_config, dtype, objective=objective, training={"updates_per_step": updates}) == choice
    for behaviour in ("sampled", "rescored"):
        if objective is not TRUNCATED:
            training = {"updates_per_step": updates, "behaviour": behaviour}
            assert chosen(run_config, dtype, objective=objective, training=training) == behaviour
    assert chosen(run_config, dtype, objective=TRUNCATED) == "rescored"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gspo", "dhpo", "gmpo"])
def test_a_policy_at_rest_is_not_clipped_in_bfloat16(
    run_config, one_layout, no_plots, monkeypatch, capsys, name
):
    """At learning rate 0 both updates of a round have log-ratios of exactly 0, whatever the sampler's rounding.

    The choice is printed and recorded, and a resume with another choice is refused.
    """
    updates, over_updates = [], learner.over_updates
    monkeypatch.setattr(
        learner, "over_updates", lambda of_step: updates.extend(of_step) or over_updates(of_step)
    )
    values = run_config(
        objective={"name": name},
        optimizer={"learning_rate": 0.0},
        training={"steps": 1, "prompts_per_step": 8},
        evaluation={"every": 0, "problems": 8},
    )
    values["model"] |= {"dtype": "bfloat16"}
    train(parse_config(values))
    (row,) = (row for row in read_metrics(values["output"]) if "lpo/logp_gap_max" in row)
    assert row["lpo/logp_gap_max"] > 1e-3  # the error of the sampler's log-probs
    assert [float(update["actor/pg_clipfrac"]) for update in updates] == [0, 0]
    assert [float(update["lpo/score_abs_max"]) for update in updates] == [0, 0]
    assert max(float(update["actor/grad_norm"]) for update in updates) > 0

    assert "training.behaviour=rescored: bfloat16" in " ".join(capsys.readouterr().out.split())
    assert json.loads((Path(values["output"]) / "run.json").read_text())["behaviour"]["choice"] == "rescored"
    train(parse_config(values), resume=True)
    values["training"]["behaviour"] = "sampled"
    with pytest.raises(UserError, match=r"behaviour = 'sampled'; the run was started with 'rescored'"):
        train(parse_config(values), resume=True)
