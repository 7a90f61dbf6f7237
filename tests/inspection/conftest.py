"""Makes the scripts importable, and a run directory with made-up numbers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


@pytest.fixture(scope="session")
def synthetic_run(tmp_path_factory):
    """A run of 6 steps of 4 prompts x 4 responses with the statistics of tokens; tests do not change it."""
    from synthetic_run import write_run

    return write_run(tmp_path_factory.mktemp("runs") / "sound", steps=6, tokens=True, cut=0.8)


@pytest.fixture
def own_run(tmp_path):
    """A run of 3 steps that a test may damage."""
    from synthetic_run import write_run

    return write_run(tmp_path / "own", steps=3, prompts=2)
