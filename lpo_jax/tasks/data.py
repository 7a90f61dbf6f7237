"""The order in which rows are seen, and what the rows are: shuffled, repeated, resumable, fingerprinted."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError


def plain(value: Any) -> Any:
    """A value as JSON types: arrays as lists, numpy scalars as numbers, bytes as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def content_hash(*parts: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the rows of each part as canonical JSON: same rows in the same order, same hash.

    What JSON has no value for (a fraction, say) counts as its text.
    """
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(f"{len(rows)} rows\n".encode())
        for row in rows:
            line = json.dumps(row, sort_keys=True, separators=(",", ":"), default=str)
            digest.update(line.encode() + b"\n")
    return digest.hexdigest()


# What a hash in the state of `PromptIterator` is of.
_HASHED = {
    "data_hash": " (the task's rows)",
    "prompts_hash": " (the prompts: what the task, the chat template and the tokenizer make of the rows)",
}


class PromptIterator(Iterator[list[tuple[int, Mapping[str, Any]]]]):
    """Endless batches of P training rows with their indices, through grain.

    Every epoch is shuffled anew from the seed. A batch never straddles two epochs, so no row is twice in one
    batch (two groups of one prompt would draw the same samples); the up to P - 1 rows left at the end of an
    epoch sit that epoch out. The whole state is a number: `restore(state)` continues exactly where `state()`
    was taken.

    Supervised learning before RL walks each epoch backward, so that the first prompts of RL are not the rows whose
    solutions were just taught: of N rows, RL's first N - M prompts are none of the first M rows taught.

    Args:
      rows: rows by index.
      prompts: P, the number of rows in a batch.
      seed: of the order.
      backward: walk the same shuffled order from the end of each epoch to its beginning.
      data_hash: the task's `content_hash`; in the state, so that a resume over changed data is refused.
      prompts_hash: of the token ids of the rows' prompts; likewise.

    Raises:
      UserError: if there are fewer rows than P.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        prompts: int,
        seed: int,
        data_hash: str = "",
        prompts_hash: str = "",
        backward: bool = False,
    ):
        import grain  # here, for it imports jax

        if not 1 <= prompts <= len(rows):
            raise UserError(
                f"data: {prompts} prompts a step from {len(rows)} training rows; need 1 to {len(rows)}"
            )
        self._rows = rows
        self._about = {"prompts": prompts, "seed": seed, "rows": len(rows)}
        self._about |= {"data_hash": data_hash, "prompts_hash": prompts_hash}
        indices = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle()
        if backward:
            self._about["order"] = "backward"
            indices = indices[::-1]
        self._batches = indices.batch(prompts, drop_remainder=True, batch_fn=list).repeat()
        self._next = 0

    def __next__(self) -> list[tuple[int, Mapping[str, Any]]]:
        batch = [(int(index), self._rows[int(index)]) for index in self._batches[self._next]]
        self._next += 1
        return batch

    @property
    def epoch(self) -> float:
        """Epochs seen so far, fractions included."""
        return self._next / (self._about["rows"] // self._about["prompts"])

    def state(self) -> dict[str, int | str]:
        """The position, and what it is a position in; JSON types."""
        return {"next": self._next, **self._about}

    def restore(self, state: Mapping[str, int | str]) -> None:
        """Continues where `state()` was taken.

        Raises:
          UserError: if the data, the seed or the batch size differ from those of the state, with the
            differences.
        """
        # A checkpoint of an older version has no hash of the prompts.
        was = {"prompts_hash": self._about["prompts_hash"], **state}
        changed = [
            f"{k} was {was.get(k)!r}, is {v!r}{_HASHED.get(k, '')}"
            for k, v in self._about.items()
            if was.get(k) != v
        ]
        if changed:
            raise UserError(
                f"data: cannot resume: {'; '.join(changed)}; use the same again, or start a new run"
            )
        self._next = int(state["next"])
