"""Compiler flags: when they are added, and that the compiler that is installed has them."""

import os
import subprocess
import sys

import jax
import pytest

from lpo_jax import accelerators
from lpo_jax.parallel import compiler_flags, hosts

GPU, CPU = "--xla_gpu_enable_command_buffer=+WHILE", "--xla_backend_optimization_level=2"


@pytest.mark.parametrize(
    "there, platforms, given, expected",
    [
        ("nvidia0", "", "", GPU),
        ("nvidia0", "cuda,cpu", "--xla_a=1", f"--xla_a=1 {GPU}"),
        ("nvidia0", "", "--xla_gpu_enable_command_buffer=", "--xla_gpu_enable_command_buffer="),
        ("nvidia0", "cpu", "--xla_a=1", f"--xla_a=1 {CPU}"),
        ("accel0", "", "--xla_a=1", "--xla_a=1"),
        ("accel0", "cpu", "", CPU),
        (None, "", "--xla_a=1", f"--xla_a=1 {CPU}"),
        (None, "", "--xla_backend_optimization_level=3", "--xla_backend_optimization_level=3"),
    ],
)
def test_flags_are_those_of_the_devices(monkeypatch, tmp_path, there, platforms, given, expected):
    monkeypatch.setattr(accelerators, "_GPUS", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(accelerators, "_OTHERS", (str(tmp_path / "accel[0-9]*"),))
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("XLA_FLAGS", given)
    if there:
        (tmp_path / there).touch()
    compiler_flags.add_compiler_flags()
    assert os.environ["XLA_FLAGS"] == expected


def test_commands_add_the_flags_when_they_open_the_devices(monkeypatch):
    jax.devices()  # opened with the flags of the tests, for the tests after this one
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    hosts.require_devices()
    assert os.environ["XLA_FLAGS"] == CPU


def test_a_flag_that_the_compiler_lacks_is_left_out(monkeypatch):
    monkeypatch.setattr(compiler_flags, "CPU_FLAGS", {"xla_cpu_of_no_version": "1"})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    compiler_flags.add_compiler_flags()
    assert os.environ["XLA_FLAGS"] == ""


def test_the_compiler_takes_the_flags():
    """XLA ends a process with a flag that it does not have, also one without a GPU."""
    flags = " ".join(
        f"--{name}={value}" for name, value in (compiler_flags.GPU_FLAGS | compiler_flags.CPU_FLAGS).items()
    )
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True)
