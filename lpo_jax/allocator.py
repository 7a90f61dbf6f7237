"""Freed memory stays with the process, where it is the CPU that computes.

glibc gives a large block back to the kernel when it is freed. A training step on a CPU takes and frees gigabytes, so
that every step the kernel finds and zeroes a million pages anew, and a virtual machine may have to ask its host for
them: up to half of a step was seen to go there. The price is a process that stays as large as it once was, and
somewhat larger, as freed blocks do not always fit the next ones.
"""

import ctypes
import glob
import os

# Parameters of mallopt(3), with what they are set to: blocks of any size come from the heap, what is free at its end
# is not given back, and there is one heap, for those of other threads never hold large blocks.
_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/kfd")


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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if by_hand or accelerated or mallopt is None:
        return False
    return all([mallopt(*setting) for setting in _SETTINGS.values()])
