"""Iteration over training rows (shuffled, repeated, resumable), and the content hash of rows."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from lpo_jax.errors import UserError
from lpo_jax.tasks.images import EncodedImage
from lpo_jax.types import Json


def plain(value: Json) -> Json:
    """Convert a value to JSON types: arrays to lists, NumPy scalars to numbers, bytes to text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def content_hash(*parts: Sequence[Mapping[str, Json]]) -> str:
    """Return the SHA-256 of the rows of each part as canonical JSON, in hexadecimal.

    The same rows in the same order have the same hash. An image counts as the hash of its bytes, wherever it was found.
    Another value that JSON cannot represent, such as a fraction, counts as its text.
    """
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(f"{len(rows)} rows\n".encode())
        for row in rows:
            line = json.dumps(row, sort_keys=True, separators=(",", ":"), default=_canonical)
            digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _canonical(value: Json) -> str:
    return value.hash if isinstance(value, EncodedImage) else str(value)


# Explanations of the hashes in the state of `PromptIterator`.
_HASHED = {
    "data_hash": " (the task's rows)",
    "prompts_hash": " (the prompts, which depend on the task, the chat template and the tokenizer)",
}


class PromptIterator(Iterator[list[tuple[int, Mapping[str, Json]]]]):
    """An endless iterator over batches of P training rows with their indices, built on grain.

    Every epoch is shuffled anew from the seed. A batch never spans two epochs, so no row occurs twice in one batch: two
    groups of the same prompt would draw the same samples. The remaining rows at the end of an epoch, at most P - 1, are
    skipped in that epoch. The position is a single number, and `restore(state)` continues exactly where `state()` was
    taken.

    Supervised learning before RL reads each epoch backward, so that RL does not begin with the rows whose solutions
    were just taught: of N rows, the first N - M prompts of RL include none of the first M rows taught.

    Args:
      rows: rows by index.
      prompts: P, the number of rows in a batch.
      seed: seed of the order.
      backward: whether to read each epoch's shuffled order from its end to its beginning.
      data_hash: the task's `content_hash`. It is part of the state, so that a resume over changed data is refused.
      prompts_hash: a hash of the token ids of the rows' prompts, used in the same way.

    Raises:
      UserError: if there are fewer than P rows.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Json]],
        *,
        prompts: int,
        seed: int,
        data_hash: str = "",
        prompts_hash: str = "",
        backward: bool = False,
    ):
        import grain  # imported here, because it imports JAX

        if not 1 <= prompts <= len(rows):
            raise UserError(
                f"data: {prompts} prompts per step from {len(rows)} training rows; need 1 to {len(rows)} prompts"
            )
        self._rows = rows
        self._about: dict[str, Json] = {"prompts": prompts, "seed": seed, "rows": len(rows)}
        self._about |= {"data_hash": data_hash, "prompts_hash": prompts_hash}
        indices = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle()
        if backward:
            self._about["order"] = "backward"
            indices = indices[::-1]
        self._batches = indices.batch(prompts, drop_remainder=True, batch_fn=list).repeat()
        self._next = 0

    def __next__(self) -> list[tuple[int, Mapping[str, Json]]]:
        batch = [(int(index), self._rows[int(index)]) for index in self._batches[self._next]]
        self._next += 1
        return batch

    @property
    def epoch(self) -> float:
        """Epochs read so far, as a fraction."""
        return self._next / (self._about["rows"] // self._about["prompts"])

    def state(self) -> dict[str, int | str]:
        """Return the position and a description of the data, in JSON types."""
        return {"next": self._next, **self._about}

    def restore(self, state: Mapping[str, int | str]) -> None:
        """Continue where `state()` was taken.

        Raises:
          UserError: if the data, the seed or the batch size differ from those in the state; the message lists the
            differences.
        """
        # Checkpoints of older versions have no hash of the prompts.
        was = {"prompts_hash": self._about["prompts_hash"], **state}
        changed = [
            f"{k} was {was.get(k)!r}, is {v!r}{_HASHED.get(k, '')}"
            for k, v in self._about.items()
            if was.get(k) != v
        ]
        if changed:
            raise UserError(
                f"data: cannot resume: {'; '.join(changed)}; restore the previous values, or start a new run"
            )
        self._next = int(state["next"])
