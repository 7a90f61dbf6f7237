"""Tests of the plugin tests/margins.py, and of the XLA flags that conftest.py sets."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

SAMPLE = """
import chex
import jax.numpy as jnp
import numpy as np
import pytest

def test_equal():
    np.testing.assert_allclose(np.ones(3), 1, rtol=1e-12)

def test_far():
    np.testing.assert_allclose([1.0, 2.0, np.nan], [1.0, 2.01, np.nan], rtol=0, atol=0.1)  # 10
    assert 1.0 == pytest.approx(1.0 + 1e-8, rel=0, abs=1e-6)  # 100

def test_close():
    np.testing.assert_allclose([0.0, 5e-6], 0, atol=1e-5)  # 2

def test_tree():
    chex.assert_trees_all_close({"a": jnp.array([3.0])}, {"a": jnp.array([1.0])}, atol=5.0, rtol=0)  # 2.5

def test_bound():
    np.testing.assert_array_less(-7.0, 1e-5)  # no difference
    np.testing.assert_array_less([1e-6, 8e-6], 1e-5)  # 1.25

def test_approx():
    assert [1.0, 2.0] == pytest.approx([1.0, 2.5], rel=0, abs=1.0)  # 2
    assert 1.0 != pytest.approx(2.0)

def test_quiet():
    assert np.allclose(1.0, 1.5, rtol=0, atol=1.0) and not np.allclose(1, 3)  # 2
"""


def run(tmp_path, *options):
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "margins", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.split("smallest margins", 1)[1].splitlines()]
    return done, [
        (float(x[0]), x[-1].split("::")[1]) for x in lines if x and "::" in x[-1] and x[0][0].isdigit()
    ]


def test_tests_near_a_bound_fail_and_are_listed(tmp_path):
    done, listed = run(tmp_path)
    assert done.returncode == 1 and "5 failed, 2 passed" in done.stdout
    assert "5e-06 of 1e-05 allowed, a margin of 2.00" in done.stdout
    assert sorted(listed) == [
        (1.25, "test_bound"),
        (2, "test_approx"),
        (2, "test_close"),
        (2, "test_quiet"),
        (2.5, "test_tree"),
        (10, "test_far"),
        (100, "test_far"),
    ]


@pytest.mark.slow
def test_workers_report_their_margins(tmp_path):
    done, listed = run(tmp_path, "--margin", "1.5", "-n", "2")
    assert done.returncode == 1 and "1 failed, 6 passed" in done.stdout
    assert listed[0] == (1.25, "test_bound") and len(listed) == 7


def test_flags_of_the_caller_are_kept():
    """There are eight devices even if the caller sets `XLA_FLAGS=--xla_cpu_max_isa=...`."""
    assert jax.device_count() == 8 or "device_count" in os.environ.get("XLA_FLAGS", "")
