"""Ragged token lists to padded arrays of few sizes, so that few programs are compiled.

Every real sequence is left-aligned: padding comes last.
"""

import numpy as np

SMALLEST_BUCKET = 16
NO_LIMIT = 2**30


def bucket(length: int, limit: int) -> int:
    """The padded size for `length` tokens: 16, 32, 64, ... and at last `limit` itself.

    Few sizes mean few compiled programs: at most log2(limit / 16) + 2 for each padded axis.
    """
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return max(min(size, limit), length)


def pad_to(x: np.ndarray, size: int, axis: int = -1) -> np.ndarray:
    """Pads one axis with zeros behind its end."""
    room = [(0, 0)] * x.ndim
    room[axis] = (0, size - x.shape[axis])
    return np.pad(x, room)


def pad_rows(x: np.ndarray, more: int, value: int = 0) -> np.ndarray:
    """`more` rows of `value` behind the last one; none: `x` itself."""
    room = [(0, more)] + [(0, 0)] * (np.ndim(x) - 1)
    return np.pad(x, room, constant_values=value) if more else x


def pad_prompts(ids: list[list[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists to `[P, S]` int32, S a bucket, and lengths `[P]`."""
    lengths = np.array([len(row) for row in ids], np.int32)
    prompts = np.zeros((len(ids), bucket(int(lengths.max()), limit)), np.int32)
    for row, values in zip(prompts, ids):
        row[: len(values)] = values
    return prompts, lengths
