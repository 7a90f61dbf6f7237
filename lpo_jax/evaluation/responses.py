"""The file with the responses to one benchmark, appended batch by batch, so that an evaluation can be resumed.

A batch is synced to the disk before `append` returns. If the process is killed while it writes a batch, the next start
removes the partial batch and samples it again. The result is the same, because each sample has its own random numbers
and batches have a fixed shape.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lpo_jax.files import append, cannot_write
from lpo_jax.json_lines import dump_line, read_lines
from lpo_jax.types import Json


class ResponseSummary(NamedTuple):
    """The fields of a response record that the scores depend on."""

    outcome: str
    answer: str | None
    reward: float
    tokens: int
    finished: bool
    reason: str | None = None  # why the verifier failed, for outcome "infrastructure"


class ResponseFile:
    """A JSONL file with K responses to each of P problems, ordered by problem as in `Rollouts.records`.

    Args:
      path: the file. It is created if needed; an existing file is truncated after its last complete batch.
      problems: P.
      num_responses: K.
      batch: the number of problems that are written together.

    Attributes:
      summaries: one for each response in the file, in order.

    Raises:
      UserError: a line before the last is not a response or is out of order, or the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike, problems: int, num_responses: int, batch: int):
        self.path, self._K = Path(path), num_responses
        self._total, self._unit = problems * num_responses, batch * num_responses
        self.summaries: list[ResponseSummary] = []
        try:
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 - closed by __exit__
            self._file.truncate(self._read())
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    @property
    def problems(self) -> int:
        """The number of problems whose K responses are all in the file."""
        return len(self.summaries) // self._K

    def clear(self) -> None:
        """Remove all responses, so that the next run of the command samples them again."""
        self._file.truncate(0)
        self.summaries.clear()

    def append(self, records: Iterable[Mapping[str, Json]]) -> None:
        """Write one batch and sync it to the disk. Raises `UserError` if it cannot be written."""
        records = list(records)
        try:
            append(self._file, b"".join(map(dump_line, records)))
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.summaries += map(_summary, records)

    def _read(self) -> int:
        """Fill `summaries` with the complete batches and return the byte offset at which the last one ends."""

        def check(record: Json) -> None:
            if (record["id"], record["k"]) != divmod(len(self.summaries), self._K):
                raise ValueError("the response is out of order")
            self.summaries.append(_summary(record))

        end = whole = position = 0
        lines = read_lines(self.path, check, may_be_torn=True, remedy="remove the file to sample again")
        for line, _ in lines:
            position += len(line)
            if not line.endswith(b"\n"):
                break  # only the newline is missing: the batch is sampled again
            if len(self.summaries) % self._unit == 0 or len(self.summaries) == self._total:
                end, whole = position, len(self.summaries)
        del self.summaries[whole:]
        return end


def _summary(record: Mapping[str, Json]) -> ResponseSummary:
    answer = record["parts"].get("answer")
    # A user's verifier may return a number as the answer.
    answer = None if answer is None else str(answer)
    reason = record["parts"].get("reason") if record["outcome"] == "infrastructure" else None
    return ResponseSummary(
        record["outcome"], answer, record["score"], record["tokens"], record["finished"], reason
    )
