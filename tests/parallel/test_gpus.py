"""Drivers that suit the installed JAX and others, by what Linux says about them."""

import os

import jax
import pytest
import yaml

from lpo_jax.commands.main import main
from lpo_jax.errors import UserError
from lpo_jax.parallel import gpus

CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.3.0\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root@host)  Mon Aug  4\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that sets the driver of this machine and the CUDA versions that JAX is installed for."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")

    def make(text, *installed):
        gpus.DRIVER.write_text(text)
        names = [f"jax_cuda{cuda}_plugin" for cuda in installed]
        monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: name in names or None)

    return make


@pytest.mark.parametrize(
    ("text", "version", "installed"),
    [
        (CLOSED, "535.104.05", [12]),
        (OPEN, "580.65.06", [13]),
        (OPEN, "550.54.15", [12, 13]),
        (CLOSED, "470.57.02", []),
        ("NVRM version: something else\n", "", [13]),
    ],
)
def test_drivers_that_suit_or_are_not_needed(machine, text, version, installed):
    machine(text.format(version), *installed)
    gpus.prepare()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"  # as the user says


def test_no_driver(machine, monkeypatch):
    machine("", 12)
    gpus.DRIVER.unlink()
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    gpus.prepare()
    assert os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION") == "0.9"


@pytest.mark.parametrize(
    ("text", "version", "cuda", "needed"),
    [
        (CLOSED, "470.57.02", 12, "525.60.13"),
        (OPEN, "580.65.05", 13, "580.65.06"),
        (OPEN, "575.57.08", 13, "580"),
    ],
)
def test_a_driver_that_is_too_old_is_named_with_the_jax_that_needs_more(machine, text, version, cuda, needed):
    machine(text.format(version), cuda)
    says = rf"driver {version} is too old for .* jax {jax.__version__} with CUDA {cuda}, which needs {needed}"
    with pytest.raises(UserError, match=says) as error:
        gpus.prepare()
    assert "\n" not in str(error.value)


def test_a_run_ends_before_it_begins(machine, run_config, tmp_path, capsys):
    machine(CLOSED.format("470.57.02"), 12)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config()))
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "")
    try:
        assert main(["train", str(path)]) == 2
    finally:
        jax.config.update("jax_platforms", before)
    error = capsys.readouterr().err
    assert "driver 470.57.02 is too old" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
