"""Pad ragged token lists to arrays of few different sizes, so that few programs are compiled.

Every real sequence is left-aligned: padding comes last.
"""

from collections.abc import Sequence

import numpy as np

SMALLEST_BUCKET = 16
NO_LIMIT = 2**30


def bucket(length: int, limit: int) -> int:
    """Return the padded size for `length` tokens: 16, 32, 64, ..., capped at `limit`.

    A length above the limit is returned as it is. A padded axis has at most log2(limit / 16) + 2 sizes, and so many
    compiled programs.
    """
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return max(min(size, limit), length)


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n >= 1."""
    return 1 << (int(n) - 1).bit_length()


def pad_to(x: np.ndarray, size: int, axis: int = -1, value: int = 0) -> np.ndarray:
    """Pads one axis at its end with `value`."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, size - x.shape[axis])
    return np.pad(x, width, constant_values=value)


def pad_prompts(ids: Sequence[Sequence[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return token lists as an array `[P, S]` int32, with S a bucket, and their lengths `[P]` int32."""
    lengths = np.array([len(row) for row in ids], np.int32)
    prompts = np.zeros((len(ids), bucket(int(lengths.max()), limit)), np.int32)
    for row, values in zip(prompts, ids):
        row[: len(values)] = values
    return prompts, lengths
