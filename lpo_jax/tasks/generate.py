"""Seeded problems without repeats."""

import random
from collections.abc import Callable, Hashable
from typing import Any

from lpo_jax.errors import UserError

_PATIENCE = 20_000  # draws in a row that bring nothing new


def train_and_heldout(
    draw: Callable[[random.Random], dict[str, Any] | None],
    key: Callable[[dict[str, Any]], Hashable],
    *,
    name: str,
    train_size: int,
    heldout_size: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draws two lists of rows in which no problem occurs twice, within or across.

    The held-out rows come first and from a stream of their own: they stay the same when `train_size` changes,
    and a larger training set begins with the smaller one.

    Args:
      draw: makes a row from random numbers (by `randrange` alone, which gives the same on every Python), or
        None when the draw came to nothing.
      key: what makes two rows the same problem.
      name: of the task, for errors.
      train_size, heldout_size: rows wanted.
      seed: any integer.

    Raises:
      UserError: if a size makes no sense, or there are not that many different problems.
    """
    if train_size < 1 or heldout_size < 1:
        raise UserError(
            f"task {name}: train_size {train_size}, heldout_size {heldout_size}: need at least 1 of each"
        )
    seen: set[Hashable] = set()

    def rows(size: int, stream: str) -> list[dict[str, Any]]:
        rng, found, misses = random.Random(f"{name}/{seed}/{stream}"), [], 0
        while len(found) < size:
            row = draw(rng)
            if row is not None and key(row) not in seen:
                seen.add(key(row))
                found.append(row)
                misses = 0
            elif (misses := misses + 1) >= _PATIENCE:
                raise UserError(
                    f"task {name}: found only {len(seen)} different problems with these options, not the "
                    f"{train_size} + {heldout_size} asked for; ask for fewer rows or for larger numbers"
                )
        return found

    heldout = rows(heldout_size, "heldout")
    return rows(train_size, "train"), heldout
