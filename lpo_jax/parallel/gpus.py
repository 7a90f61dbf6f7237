"""NVIDIA GPUs of this machine: whether their driver suits the installed JAX, and the memory that a run takes."""

import importlib.util
import os
import re
from importlib import metadata
from pathlib import Path

from lpo_jax.errors import UserError

# The part of the memory that JAX's allocator takes. Its default of 0.75 would leave the rest unused; the CUDA context,
# cuBLAS and NCCL need some of it.
MEMORY_SHARE = 0.9
DRIVER = Path("/proc/driver/nvidia/version")  # exists if the driver is loaded, in containers too
# The oldest Linux driver for each major version of CUDA: docs.nvidia.com/cuda/cuda-toolkit-release-notes, minimum
# required driver version for minor version compatibility.
OLDEST_DRIVERS = {12: "525.60.13", 13: "580.65.06"}


def prepare() -> None:
    """Set the share of memory and check the driver. Call this before JAX opens the devices.

    JAX itself only logs that a driver is too old, and computes on the CPU.

    Raises:
      UserError: the driver is too old for every CUDA version that JAX is installed for.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))
    installed = [cuda for cuda in OLDEST_DRIVERS if importlib.util.find_spec(f"jax_cuda{cuda}_plugin")]
    if not installed or not DRIVER.exists():
        return
    found = re.search(r"Kernel Module\D.*?\s(\d+(?:\.\d+)+)\s", DRIVER.read_text())
    if found is None or any(_numbers(found[1]) >= _numbers(OLDEST_DRIVERS[cuda]) for cuda in installed):
        return
    cuda = installed[0]
    raise UserError(
        f"the NVIDIA driver {found[1]} is too old for the installed jax {metadata.version('jax')} with CUDA {cuda}, "
        f"which needs {OLDEST_DRIVERS[cuda]} or newer; update the driver, or set JAX_PLATFORMS=cpu"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
