"""Freed memory stays with the process, where it is the CPU that computes.

glibc gives a large block back to the kernel when it is freed. A training step on a CPU takes and frees gigabytes, so
that every step the kernel finds and zeroes a million pages anew, and a virtual machine may have to ask its host for
them: up to half of a step was seen to go there. The price is a process that stays as large as it once was, and
somewhat larger, as freed blocks do not always fit the next ones. The heap grows by huge pages, which takes a 512th of
the turns.
"""

import ctypes
import glob
import mmap
import os
import resource
from pathlib import Path

# Parameters of mallopt(3), with what they are set to: blocks of any size come from the heap, what is free at its end
# is not given back, and there is one heap, for those of other threads never hold large blocks.
_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/kfd")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def keep_freed_memory() -> bool:
    """Sets glibc's allocator so; call it before anything starts threads, as importing numpy or jax does.

    Returns:
      Whether it did: not beside an accelerator, nor with another C library, nor where the environment sets the
      allocator itself (`GLIBC_TUNABLES`, `MALLOC_ARENA_MAX` and so on, see mallopt(3)).
    """
    by_hand = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    accelerated = os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(glob.glob, _ACCELERATORS))
    libc = ctypes.CDLL(None)
    if by_hand or accelerated or not hasattr(libc, "mallopt"):
        return False
    kept = all([libc.mallopt(*setting) for setting in _SETTINGS.values()])
    if kept and not _address_space_counts():
        _grow_by_huge_pages(libc, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4)
    return kept


def _address_space_counts() -> bool:
    """Whether memory that is asked for and not touched is somebody's loss: of this process, by its limit, or of others,
    where the kernel promises no more than it has."""
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return limited or (_OVERCOMMIT.exists() and _OVERCOMMIT.read_text().strip() == "2")


def _grow_by_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Has the heap's next `size` bytes lie in huge pages, where the kernel has any: a block is taken, marked and freed,
    which touches none of it, and is the heap's from then on."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:  # another limit
        return
    start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(start, size - (start - block), mmap.MADV_HUGEPAGE)
    libc.free(block)
