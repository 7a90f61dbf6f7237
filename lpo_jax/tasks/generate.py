"""Generate problems from a seed, without repeats."""

import random
from collections.abc import Callable, Hashable

from lpo_jax.errors import UserError
from lpo_jax.types import Json

_PATIENCE = 20_000  # stop after this many draws in a row without a new problem


def train_and_heldout(
    draw: Callable[[random.Random], dict[str, Json] | None],
    key: Callable[[dict[str, Json]], Hashable],
    *,
    name: str,
    train_size: int,
    heldout_size: int,
    seed: int,
) -> tuple[list[dict[str, Json]], list[dict[str, Json]]]:
    """Draw a list of training rows and a list of held-out rows; no problem occurs twice, within a list or across.

    The held-out rows are drawn first, from their own random stream. So they do not depend on `train_size`, and a larger
    training set begins with the smaller one.

    Args:
      draw: makes a row from random numbers, or returns None if the draw is rejected. It uses only `randrange`, which is
        the same in every Python version.
      key: maps a row to a key that identifies its problem.
      name: the name of the task, for error messages and random streams.
      train_size, heldout_size: number of rows.
      seed: any integer.

    Returns:
      The training rows and the held-out rows.

    Raises:
      UserError: if a size is less than 1, or there are too few different problems.
    """
    if train_size < 1 or heldout_size < 1:
        raise UserError(
            f"task {name}: train_size {train_size}, heldout_size {heldout_size}: need at least 1 of each"
        )
    seen: set[Hashable] = set()

    def rows(size: int, stream: str) -> list[dict[str, Json]]:
        found: list[dict[str, Json]] = []
        rng, misses = random.Random(f"{name}/{seed}/{stream}"), 0
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
