"""Golden files made by transformers; see scripts/make_golden_*.py."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import rng

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _same_numbers():
    """Every test draws the same numbers, whichever tests have run before."""
    rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture
def llama(tmp_path):
    """A copy of a golden directory that a test may damage."""
    return shutil.copytree(GOLDEN / "llama", tmp_path / "llama")


@pytest.fixture(scope="session")
def deviation():
    """The largest difference between a model's logits and the golden ones, over real tokens."""

    def measure(model, name):
        data = np.load(GOLDEN / name / "logits.npz")
        logits = np.asarray(model.logits(data["tokens"], data["mask"]))
        assert logits.shape == data["logits"].shape and logits.dtype == np.float32
        return np.abs(logits - data["logits"])[data["mask"]].max()

    return measure
