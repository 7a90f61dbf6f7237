"""Compiler flags, added to XLA_FLAGS before JAX opens the devices.

NVIDIA GPUs: XLA records the kernels of a program in CUDA graphs, which start faster than single kernels. By default
loops are not recorded. With `WHILE` the decode loop is one graph: on an H200, a decode step of a model of 0.6B
parameters, which is bound by the start of kernels, took 2.31 ms instead of 2.45 (docs/performance.md).

CPUs: at LLVM's level 2 instead of 3, an update compiles in less than half of the time and runs as fast
(docs/performance.md).
"""

import importlib.util
import mmap
import os
from pathlib import Path

from lpo_jax.accelerators import has_accelerator, has_nvidia_gpu

GPU_FLAGS = {"xla_gpu_enable_command_buffer": "+WHILE"}  # in addition to what is recorded by default
CPU_FLAGS = {"xla_backend_optimization_level": "2"}


def add_compiler_flags() -> None:
    """Add the flags for an NVIDIA GPU, or for the CPU if there is no accelerator, to XLA_FLAGS if it lacks them.

    XLA ends the process when it reads a flag that it does not have, so only flags that occur in jaxlib are added.
    """
    flags = GPU_FLAGS if has_nvidia_gpu() else {} if has_accelerator() else CPU_FLAGS
    given = os.environ.get("XLA_FLAGS", "")
    new = [f"--{name}={value}" for name, value in flags.items() if name not in given and _in_jaxlib(name)]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *new])


def _in_jaxlib(name: str) -> bool:
    """Return whether the compiler that is installed has a flag of this name."""
    library = Path(importlib.util.find_spec("jaxlib").origin).parent / "libjax_common.so"
    if not library.exists():
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode() + b"\0") >= 0
