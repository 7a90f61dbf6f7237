"""The accelerators that the operating system shows, without opening them.

The C library and XLA read their settings once, before JAX can be asked for its devices.
"""

import glob
import os

_GPUS = "/dev/nvidia[0-9]*"
_OTHERS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/kfd")


def has_nvidia_gpu() -> bool:
    """Return whether there is an NVIDIA GPU that JAX_PLATFORMS allows."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return bool(glob.glob(_GPUS)) and (not platforms or bool({"cuda", "gpu"} & set(platforms.split(","))))


def has_accelerator() -> bool:
    """Return whether there is an accelerator of any kind that JAX_PLATFORMS allows."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(glob.glob, (_GPUS, *_OTHERS)))
