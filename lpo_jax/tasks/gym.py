"""The reasoning-gym task: any of its generated datasets, by name (extra `[envs]`)."""

from collections.abc import Iterator, Mapping

from lpo_jax.errors import UserError
from lpo_jax.rewards import VerifierSpec
from lpo_jax.rewards.gym import open_dataset
from lpo_jax.tasks.task import Row, Task
from lpo_jax.tasks.templates import GYM, prompt_function
from lpo_jax.types import Json

_PATIENCE = 1000  # stop after this many entries in a row without a new question


def reasoning_gym_task(
    *,
    dataset: str,
    config: Mapping[str, Json] | None = None,
    train_size: int = 1000,
    heldout_size: int = 128,
    seed: int = 0,
    template: str = "tags",
) -> Task:
    """Build a task from a dataset of reasoning-gym: rows `{"question": ..., "answer": ..., "metadata": {...}}`.

    Args:
      dataset: the name of the dataset, such as `"leg_counting"`.
      config: the dataset's own options, such as `{"min_animals": 2}`.
      train_size, heldout_size: number of rows. No question occurs twice, within a split or across. Held-out rows are
        drawn first, so they do not depend on `train_size`.
      seed: seed of the entries.
      template: "tags" (reasoning-gym's own wording), "short", or a text with `{question}` that asks for
        `<answer>...</answer>`.

    Raises:
      UserError: if the package is not installed, the dataset or an option is unknown or invalid, or there are too few
        different questions.
    """
    if train_size < 1 or heldout_size < 1:
        raise UserError(
            f"task reasoning-gym: train_size {train_size}, heldout_size {heldout_size}: need at least 1 of each"
        )
    ask = prompt_function("reasoning-gym", template, GYM, "question")
    # Each entry is generated on access, from (seed, index); the size only bounds the index.
    data = open_dataset(dataset, config, seed=seed, size=(train_size + heldout_size) * _PATIENCE)
    entries = _different(dataset, data, train_size + heldout_size)
    heldout = [next(entries) for _ in range(heldout_size)]
    train = [next(entries) for _ in range(train_size)]
    verifier = VerifierSpec("reasoning-gym", {"dataset": dataset, "config": dict(config or {})})
    return Task("reasoning-gym", train, heldout, ask, verifier, _solve)


def _different(name: str, data: Json, wanted: int) -> Iterator[dict[str, Json]]:
    """Yield entries with different questions.

    Raises:
      UserError: if there are too few of them.
    """
    seen: set[str] = set()
    misses = 0
    for index in range(len(data)):
        entry = data[index]
        if entry["question"] in seen:
            if (misses := misses + 1) >= _PATIENCE:
                break
            continue
        seen.add(entry["question"])
        misses = 0
        # Unchanged, because the scorer distinguishes tuples from lists.
        yield {key: entry[key] for key in ("question", "answer", "metadata")}
    raise UserError(
        f"task reasoning-gym: {name} has only {len(seen)} different questions with these options, not {wanted}; ask "
        "for fewer rows or change config"
    )


def _solve(row: Row) -> str | None:
    return f"<answer>{row['answer']}</answer>" if isinstance(row["answer"], str) else None
