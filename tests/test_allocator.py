"""Freed memory stays with the process.

Each test starts a process, because the allocator must be configured before threads start.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

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

# Prints for each part of the heap whether it is marked for huge pages.
MARKED = """
import json
from lpo_jax import allocator
{before}
allocator.keep_freed_memory()
block = bytearray(1 << 26)
maps = open("/proc/self/smaps").read().split("VmFlags:")
heap = [flags for before, flags in zip(maps, maps[1:]) if "[heap]" in before]
print(json.dumps([" hg" in flags.splitlines()[0] for flags in heap]))
"""


def run(program=PROGRAM, **environment):
    """Run a program and parse its output; PROGRAM prints whether memory is kept, and page faults of 5 allocations."""
    clean = {name: x for name, x in os.environ.items() if name != "GLIBC_TUNABLES" and "MALLOC_" not in name}
    clean |= {"JAX_PLATFORMS": "cpu"} | environment
    return json.loads(subprocess.check_output([sys.executable, "-c", program], env=clean, text=True))


def test_freed_blocks_are_reused():
    kept, faults = run()
    assert kept
    assert faults < 100


@pytest.mark.parametrize("by_hand", [{"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {"MALLOC_ARENA_MAX": "4"}])
def test_settings_of_the_environment_are_respected(by_hand):
    kept, faults = run(**by_hand)
    assert not kept
    assert faults > 100


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages"
)
def test_the_heap_grows_by_huge_pages(tmp_path):
    (tmp_path / "freely").write_text("0\n")
    assert any(run(MARKED.format(before=f"allocator._OVERCOMMIT = allocator.Path('{tmp_path}/freely')")))


def test_no_address_space_is_reserved_where_it_is_limited(tmp_path):
    (tmp_path / "strictly").write_text("2\n")
    assert not any(
        run(MARKED.format(before=f"allocator._OVERCOMMIT = allocator.Path('{tmp_path}/strictly')"))
    )
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 36, resource.RLIM_INFINITY))"
    assert not any(run(MARKED.format(before=limit)))


def test_memory_is_not_kept_beside_an_accelerator(monkeypatch, tmp_path):
    from lpo_jax import accelerators, allocator

    for name in [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(accelerators, "_GPUS", f"{tmp_path}/nvidia[0-9]*")
    assert not allocator.keep_freed_memory()
