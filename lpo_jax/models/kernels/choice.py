"""Which attention runs: kernels for TPUs, for NVIDIA GPUs, or plain matrix products.

The choice is a static argument of the programs, so that a machine can compile for devices that it does not have.
"""

import re
from typing import Literal

import jax
from jax.typing import DTypeLike

from lpo_jax.models.kernels import cudnn

# plain: matrix products, on any device. pallas: the kernels for TPUs. triton: the Pallas kernels for NVIDIA GPUs.
# cudnn: cuDNN's attention, and of the Pallas kernels for GPUs only that for a KV cache in pages. auto: what `chosen`
# returns. interpret, interpret_triton: the Pallas kernels for TPUs and for GPUs in the interpreter, on any device, for
# tests.
Attention = Literal["auto", "plain", "pallas", "cudnn", "triton", "interpret", "interpret_triton"]

KERNELS_OF = {"pallas": "tpu", "cudnn": "gpu", "triton": "gpu"}  # the platform of each
CAPABILITY = 8.0  # Ampere: the oldest GPUs with bfloat16 in Triton and cuDNN


def uses_kernels(attention: Attention) -> bool:
    """Return whether this choice selects kernels on the default device. Decoding then has a KV cache in pages."""
    if attention == "auto":
        return jax.default_backend() == "tpu" or not lacks_gpu()
    return attention != "plain"


def chosen(
    attention: Attention, dtype: DTypeLike, head_width: int, window: int | None
) -> tuple[Attention, str]:
    """Return the attention that `auto` stands for on the default device, and why; any other choice as it is.

    Args:
      attention: the choice.
      dtype: of queries, keys and values.
      head_width: the width of an attention head.
      window: the number of keys that a query attends to; None: all before it.
    """
    if attention != "auto":
        return attention, f"model.attention={attention}"
    if jax.default_backend() != "tpu" and (lacking := lacks_gpu()):
        return "plain", f"matrix products; {lacking}"
    return best_on(jax.default_backend(), dtype, head_width, window)


def best_on(platform: str, dtype: DTypeLike, head_width: int, window: int | None) -> tuple[Attention, str]:
    """Return the kernels for a platform, "tpu" or "gpu" of NVIDIA, and why; arguments as in `chosen`."""
    if platform == "tpu":
        return "pallas", "kernels for TPUs"
    if refused := cudnn.refuses(dtype, head_width, window):
        return "triton", f"Pallas kernels instead of cuDNN: {refused}"
    return "cudnn", "cuDNN, and Pallas kernels for the KV cache in pages"


def lacks_gpu() -> str:
    """Return why the kernels for GPUs cannot run on the default device; empty if they can."""
    if jax.default_backend() != "gpu":
        return "there is no GPU here"
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", capability):
        return f"{device.device_kind} is not an NVIDIA GPU"
    if float(capability) < CAPABILITY:
        return f"{device.device_kind} has compute capability {capability}, and kernels need {CAPABILITY}"
    return ""
