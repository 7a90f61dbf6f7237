"""Compiler flags for GPUs: when they are added, and that the compiler that is installed has them."""

import os
import subprocess
import sys

import pytest

from lpo_jax.parallel import gpu_flags


@pytest.mark.parametrize(
    "there, platforms, given, expected",
    [
        (True, "", "", "--xla_gpu_enable_command_buffer=+WHILE"),
        (True, "cuda,cpu", "--xla_a=1", "--xla_a=1 --xla_gpu_enable_command_buffer=+WHILE"),
        (True, "", "--xla_gpu_enable_command_buffer=", "--xla_gpu_enable_command_buffer="),
        (True, "cpu", "--xla_a=1", "--xla_a=1"),
        (False, "", "--xla_a=1", "--xla_a=1"),
    ],
)
def test_flags_are_added_where_there_is_a_gpu(monkeypatch, tmp_path, there, platforms, given, expected):
    monkeypatch.setattr(gpu_flags, "_GPUS", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("XLA_FLAGS", given)
    if there:
        (tmp_path / "nvidia0").touch()
    gpu_flags.add_gpu_flags()
    assert os.environ["XLA_FLAGS"] == expected


def test_a_flag_that_the_compiler_lacks_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_flags, "_GPUS", str(tmp_path))
    monkeypatch.setattr(gpu_flags, "FLAGS", {"xla_gpu_of_no_version": "1"})
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("XLA_FLAGS", "")
    gpu_flags.add_gpu_flags()
    assert os.environ["XLA_FLAGS"] == ""


def test_the_compiler_takes_the_flags():
    """XLA ends a process with a flag that it does not have, also one without a GPU."""
    flags = " ".join(f"--{name}={value}" for name, value in gpu_flags.FLAGS.items())
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True)
