"""Generated sums of integers: the smallest task on which a model visibly learns."""

import random

from lpo_jax.errors import UserError
from lpo_jax.rewards import VerifierSpec
from lpo_jax.tasks.generate import train_and_heldout
from lpo_jax.tasks.task import Task, with_prefill
from lpo_jax.types import Json

PREFILL = "<answer>"


def arithmetic_task(
    *, terms: int = 2, max_number: int = 99, train_size: int = 1000, heldout_size: int = 128, seed: int = 0
) -> Task:
    """Generate a task of integer sums: rows `{"terms": [12, 7], "answer": 19}` with prompts `12 + 7 = ?`.

    Args:
      terms: how many numbers are added.
      max_number: the largest number; the smallest is 0.
      train_size, heldout_size: number of rows. No sum (terms in any order) occurs twice, within a split or across.
      seed: seed of the problems.

    Raises:
      UserError: if an option has an invalid value, or there are too few different sums.
    """
    if terms < 2 or max_number < 1:
        raise UserError(
            f"task arithmetic: terms {terms}, max_number {max_number}: need at least 2 terms, "
            "and max_number of at least 1"
        )

    def draw(rng: random.Random) -> dict[str, Json]:
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
