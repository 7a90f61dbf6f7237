"""Test benchmarks/device.py with tiny shapes on this machine's CPU."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "device.py"


@pytest.fixture
def device(monkeypatch):
    spec = importlib.util.spec_from_file_location("device", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "device", module)  # its dataclasses resolve annotations there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.Machine, "measure", lambda dtype: module.Machine(1e12, 1e10))
    return module


@pytest.mark.slow
def test_one_layer_agrees_with_itself_and_its_sampler(device):
    rows = list(device.parity(device.TINY))
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    exact, rounded = rows
    assert exact["logp_device_minus_cpu"] == 0.0  # the device is the CPU
    assert (
        exact["logp_kernels_minus_plain"] == exact["gradient_kernels_minus_plain"] == 0.0
    )  # plain attention
    assert exact["logp_sampler_minus_trainer"] < 1e-3 < rounded["logp_sampler_minus_trainer"] < 0.5


def test_what_there_is_no_time_for_is_named(device):
    assert list(device.within(60, iter([{"a": 1}, {"a": 2}]))) == [{"a": 1}, {"a": 2}]
    assert list(device.within(-1, iter([{"a": 1}]))) == [{"left_out": "no time"}]


@pytest.mark.slow
def test_a_dry_run_writes_rows_and_a_table(device, tmp_path, monkeypatch, capsys):
    command = ["device.py", "--dry-run", "--only", "machine", "gradient", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert device.main() == 0
    rows = [json.loads(line) for line in (tmp_path / "device.jsonl").read_text().splitlines()]
    assert [row["measurement"] for row in rows] == ["machine", "gradient"]
    assert (tmp_path / "device.txt").read_text() in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "gradient"])
def test_the_plan_is_compared_with_the_measurement(device, name, monkeypatch):
    (row,) = device.MEASUREMENTS[name](device.TINY)
    measured = row["seconds"] if name == "gradient" else row["ms_per_token_step"] / 1e3
    assert row["planned_over_measured"] == pytest.approx(row["planned_s"] / measured)
    assert row["planned_s"] > 0
    unknown = dataclasses.replace(device.TINY, stand_in=None)
    assert device.planned(unknown, None, unknown.gradient, name) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "gradient", "step"])
def test_every_measurement_gives_finite_rates(device, name):
    rows = list(device.MEASUREMENTS[name](device.TINY))
    assert rows
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert all(np.isfinite(x) for x in row.values() if isinstance(x, float))


def test_table_has_a_line_per_row(device):
    text = device.table(
        [{"measurement": "step", "model": "m", "seconds": jnp.float32(0.5).item(), "at_s": 1}]
    )
    assert text.split() == ["step", "m", "seconds", "0.5"]
