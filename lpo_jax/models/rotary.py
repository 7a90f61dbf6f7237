"""Rotary embeddings: their angles, and how they turn queries and keys (arXiv 2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.models.attend import accumulator
from lpo_jax.models.config import ModelConfig


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute cosines and sines `[P, X, 1, N/2]` float32 of rotary embeddings for `positions [P, X]`."""
    return _turned(positions[..., None, None].astype(jnp.float32) * _frequencies(config))


def mrope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the `rope_table` of tokens `positions [P, X, 3]` at a time, a row and a column (arXiv 2409.12191).

    Each frequency turns with one of the three, by `config.mrope`. Where they are equal, as in text, the table is that
    of `rope_table`.
    """
    axis = np.repeat(np.arange(3), config.mrope)
    if config.mrope_interleaved:
        axis = np.zeros(config.head_width // 2, int)
        for i in (1, 2):
            axis[i : 3 * config.mrope[i] : 3] = i
    return _turned(positions[..., None, axis].astype(jnp.float32) * _frequencies(config))


def _turned(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.cos(angle), jnp.sin(angle)


def _frequencies(config: ModelConfig) -> jax.Array:
    N = config.head_width
    frequency = config.rope_theta ** (-jnp.arange(0, N, 2, dtype=jnp.float32) / N)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None:
        # Llama 3: long wavelengths are stretched by `factor`, short ones are kept, and the rest is interpolated.
        wavelength = 2 * jnp.pi / frequency
        smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = jnp.clip(smooth, 0.0, 1.0)
        frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    return frequency


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Apply rotary embeddings to `[P, X, heads, N]`, pairing element i with i + N/2 as Hugging Face does."""
    cos, sin = rope
    a, b = jnp.split(x.astype(accumulator(x.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
