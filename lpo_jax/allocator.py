"""Configure the C allocator to keep freed memory when computing on a CPU.

glibc returns a large block to the kernel when it is freed. A training step on a CPU allocates and frees gigabytes, so
the kernel has to provide and zero a million pages in every step, and a virtual machine may have to request them from
its host. This took up to half of the time of a step. With the settings below, the process keeps its peak size, and
grows somewhat beyond it because freed blocks do not always fit later requests. The heap uses huge pages of 2 MiB, which
cause 512 times fewer page faults.
"""

import ctypes
import mmap
import os
import resource
from pathlib import Path

from lpo_jax.accelerators import has_accelerator

# Parameters of mallopt(3) and their values: blocks of any size are allocated from the heap, free memory at its end is
# not returned, and there is a single heap, because the heaps of other threads cannot hold large blocks.
_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def keep_freed_memory() -> bool:
    """Make glibc's allocator keep freed memory. Call this before importing NumPy or JAX, which start threads.

    Returns:
      Whether the allocator was configured. It is not if there is an accelerator, if the C library is not glibc, or if
      the environment configures the allocator (`GLIBC_TUNABLES`, `MALLOC_ARENA_MAX` and so on, see mallopt(3)).
    """
    by_hand = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    libc = ctypes.CDLL(None)
    if by_hand or has_accelerator() or not hasattr(libc, "mallopt"):
        return False
    kept = all([libc.mallopt(*setting) for setting in _SETTINGS.values()])
    if kept and not _address_space_counts():
        _grow_by_huge_pages(libc, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4)
    return kept


def _address_space_counts() -> bool:
    """Return whether allocated but unused memory counts: against this process's limit, or because overcommit is off."""
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return limited or (_OVERCOMMIT.exists() and _OVERCOMMIT.read_text().strip() == "2")


def _grow_by_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Use huge pages for the next `size` bytes of the heap, if the kernel supports them.

    A block is allocated, marked and freed without being touched; after that it belongs to the heap.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:  # a limit was reached
        return
    start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(start, size - (start - block), mmap.MADV_HUGEPAGE)
    libc.free(block)
