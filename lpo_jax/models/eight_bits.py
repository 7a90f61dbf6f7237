"""Keys and values in 8 bits: a KV cache of half the size, of which a decode step reads half the bytes.

Every token has a scale for each key/value head, set by its largest number there. A scale for a page or a whole
sequence would change as tokens are added, so that what is stored would have to be rounded again. A scale for each token
takes 4 bytes beside the N bytes of a head: 3% more with N = 128, 6% with 64.

Everything that is sampled attends to the rounded keys and values, those of the prompt and of the new token included.
Tokens therefore do not depend on when a key was computed, or whether a prefill or a decode step did it. The sampled
model differs from the trained one; `lpo/logp_gap_*` measure by how much (`lpo_jax.training.behaviour`).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from lpo_jax.errors import UserError

# The data type of a KV cache; compute: that of activations.
KVDtype = Literal["compute", "int8", "fp8"]

_STORED = {"int8": np.dtype(np.int8), "fp8": np.dtype(jnp.float8_e4m3fn)}
_LARGEST = {_STORED["int8"]: 127.0, _STORED["fp8"]: 448.0}
SCALE_BYTES = 4
FP8_CAPABILITY = 8.9  # of the first GPUs with 8-bit floats (Ada; Hopper has 9.0)


class Quantised(struct.PyTreeNode):
    """An array of 8-bit numbers and their scales, in place of a float array of keys or values.

    Attributes:
      numbers: int8 or float8_e4m3fn.
      scale: float32, of the same shape with size 1 along the head width.
    """

    numbers: jax.Array
    scale: jax.Array


Stored = jax.Array | Quantised  # keys or values in a KV cache


def stored_dtype(kv_dtype: KVDtype, dtype: DTypeLike) -> np.dtype:
    """Return the type of the numbers in a KV cache beside activations of `dtype`."""
    return _STORED.get(kv_dtype, np.dtype(dtype))


def check_device(kv_dtype: KVDtype, device: str, capability: float) -> None:
    """Refuse a type that a device does not have.

    Args:
      kv_dtype: of the KV cache.
      device: its name, for the message.
      capability: CUDA compute capability of a GPU; infinite for other devices.

    Raises:
      UserError: it is a GPU without 8-bit floats.
    """
    if kv_dtype == "fp8" and capability < FP8_CAPABILITY:
        raise UserError(
            f"sampling.kv_dtype = fp8: {device} has no 8-bit floats (CUDA compute capability {capability}; they need "
            f"{FP8_CAPABILITY}); use int8"
        )


def dtype_of(x: Stored) -> np.dtype:
    """Return the type that keys or values are stored in."""
    return x.numbers.dtype if isinstance(x, Quantised) else x.dtype


def zeros(shape: tuple[int, ...], dtype: np.dtype, axis: int) -> Stored:
    """Return zeros that are stored in `dtype`; `axis` is that of the head width."""
    numbers = jnp.zeros(shape, dtype)
    return Quantised(numbers, jnp.zeros(_one(shape, axis))) if dtype in _LARGEST else numbers


def store(x: jax.Array, dtype: np.dtype, axis: int = -1) -> Stored:
    """Round keys or values to `dtype`, to nearest; `axis` is that of the head width.

    With int8, a number is off by at most 1/254 of the largest one of its token and head; with float8_e4m3fn, by at most
    1/16 of itself, or 1/458,752 of the largest one.
    """
    if dtype not in _LARGEST:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis, keepdims=True)
    scale = jnp.where(largest > 0, largest / _LARGEST[dtype], 1.0)
    numbers = x / scale
    return Quantised((jnp.round(numbers) if dtype == np.int8 else numbers).astype(dtype), scale)


def load(x: Stored, dtype: DTypeLike) -> jax.Array:
    """Return stored keys or values as numbers of `dtype`."""
    return (
        (x.numbers.astype(jnp.float32) * x.scale).astype(dtype)
        if isinstance(x, Quantised)
        else x.astype(dtype)
    )


def split(x: Stored, dtype: DTypeLike) -> tuple[jax.Array, jax.Array | None]:
    """Return the unscaled numbers in `dtype`, exactly, and the scale; None if there is none.

    Products with the numbers are scaled afterwards, so that a cache is not written out in `dtype`.
    """
    return (x.numbers.astype(dtype), x.scale) if isinstance(x, Quantised) else (x, None)


def _one(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    axis %= len(shape)
    return *shape[:axis], 1, *shape[axis + 1 :]
