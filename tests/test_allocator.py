"""Freed memory stays with the process: a process of its own, for the allocator is set before threads start."""

import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")

PROGRAM = """
import json, resource
from lpo_jax.allocator import keep_freed_memory
kept = keep_freed_memory()
import numpy as np
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(1 << 23)  # 64 MB, freed at once
before = faults()
for _ in range(5):
    np.ones(1 << 23)
print(json.dumps([kept, faults() - before]))
"""


def run(**environment):
    """Whether memory is kept, and the page faults of taking 64 MB five times over."""
    clean = {name: x for name, x in os.environ.items() if name != "GLIBC_TUNABLES" and "MALLOC_" not in name}
    clean |= {"JAX_PLATFORMS": "cpu"} | environment
    return json.loads(subprocess.check_output([sys.executable, "-c", PROGRAM], env=clean, text=True))


def test_blocks_are_used_again():
    kept, faults = run()
    assert kept
    assert faults < 100


@pytest.mark.parametrize("by_hand", [{"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {"MALLOC_ARENA_MAX": "4"}])
def test_the_environment_has_its_way(by_hand):
    kept, faults = run(**by_hand)
    assert not kept
    assert faults > 100


def test_memory_is_not_kept_beside_an_accelerator(monkeypatch, tmp_path):
    from lpo_jax import allocator

    for name in [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(allocator, "_ACCELERATORS", (f"{tmp_path}/nvidia[0-9]*",))
    assert not allocator.keep_freed_memory()
