"""Runs that sample in other arithmetic than they train in: the gap is reported, and the method must know of it."""

import numpy as np
import pytest

from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.models import quantize
from lpo_jax.reporting import read_metrics
from lpo_jax.training.loop import train
from lpo_jax.training.session import check_config

INT8 = {"weights": "int8"}
TRUNCATED = {"name": "dr-grpo", "token_weight": "truncated-importance"}


def test_gap_of_sampling_in_8_bits_is_reported(run_config, no_plots):
    pytest.importorskip("qwix")
    values = run_config(
        sampling=INT8,
        objective=TRUNCATED,
        training={"steps": 1, "updates_per_step": 1, "behaviour": "rescored"},
        evaluation={"every": 0, "problems": 1},
    )
    train(parse_config(values))
    (row,) = (row for row in read_metrics(values["output"]) if "lpo/logp_gap_max" in row)
    assert row["lpo/logp_gap_max"] > 1e-3 and row["lpo/logp_gap_mean"] > 1e-4
    np.testing.assert_array_less([row["lpo/logp_gap_max"], row["lpo/logp_gap_mean"]], [0.6, 0.1])
    assert row["actor/grad_norm"] > 0 and row["lpo/skipped_updates"] == 0


def test_what_cannot_be_corrected_is_refused(run_config, monkeypatch):
    def problem(**sections):
        with pytest.raises(UserError) as error:
            check_config(parse_config(run_config(**sections)))
        assert "\n" not in str(error.value)
        return str(error.value)

    rescored = {"behaviour": "rescored"}
    assert "set training.behaviour=rescored" in problem(objective=TRUNCATED)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lpo_jax[quant]'" in problem(sampling=INT8, training=rescored)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: name)
    assert "samples from another model" in problem(sampling=INT8)
    check_config(parse_config(run_config(sampling=INT8, training=rescored, objective=TRUNCATED)))


def test_a_constant_of_the_method_is_not_the_response_budget(run_config):
    def normaliser(**objective):
        return check_config(parse_config(run_config(objective=objective))).aggregate.max_tokens

    assert normaliser(name="dr-grpo") == 6  # sampling.max_tokens
    assert normaliser(name="nft") == 1000
    assert normaliser(name="nft", max_tokens=50) == normaliser(name="dr-grpo", max_tokens=50) == 50
