"""Sums of integers, generated: the smallest task on which learning can be seen."""

import random
from typing import Any

from lpo_jax.errors import UserError
from lpo_jax.rewards import VerifierSpec
from lpo_jax.tasks.generate import train_and_heldout
from lpo_jax.tasks.task import Task, with_prefill

PREFILL = "<answer>"


def arithmetic_task(
    *,
    terms: int = 2,
    max_number: int = 99,
    train_size: int = 1000,
    heldout_size: int = 128,
    seed: int = 0,
) -> Task:
    """Integer sums from a seed: rows `{"terms": [12, 7], "answer": 19}`, asked as `12 + 7 = ?`.

    Args:
      terms: how many numbers are added.
      max_number: numbers are 0 to this.
      train_size, heldout_size: rows; no sum (terms in any order) occurs twice in either or both.
      seed: of the problems.

    Raises:
      UserError: if an option makes no sense or there are too few different sums.
    """
    if terms < 2 or max_number < 1:
        raise UserError(
            f"task arithmetic: terms {terms}, max_number {max_number}: need 2 terms or more, and 1 or more"
        )

    def draw(rng: random.Random) -> dict[str, Any]:
        numbers = [rng.randrange(max_number + 1) for _ in range(terms)]
        return {"terms": numbers, "answer": sum(numbers)}

    train, heldout = train_and_heldout(
        draw,
        lambda row: tuple(sorted(row["terms"])),
        name="arithmetic",
        train_size=train_size,
        heldout_size=heldout_size,
        seed=seed,
    )
    return Task(
        "arithmetic",
        train,
        heldout,
        prompt=lambda row: with_prefill(" + ".join(map(str, row["terms"])) + " = ?\n", PREFILL),
        verifier=VerifierSpec("arithmetic", prefill=PREFILL),
        solution=lambda row: f"{row['answer']}</answer>",
    )
