"""The responses to one benchmark on disk, appended batch by batch, so that a killed evaluation can go on.

A batch is on the disk when `append` returns. Whatever a kill left of a batch that was being written is removed, and the
batch done again: as a sample's random numbers are its own, and the batch has the same shape as before, it comes out
the same.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lpo_jax.files import append, cannot_write
from lpo_jax.json_lines import dump_line, read_lines


class ResponseSummary(NamedTuple):
    """What scores are made of, of one response."""

    outcome: str
    answer: str | None
    reward: float
    tokens: int
    finished: bool
    reason: str | None = None  # of an outcome that says nothing about the response


class ResponseFile:
    """The responses to P problems, K each, one a line: problem by problem, as in `Rollouts.records`.

    Args:
      path: of the file; made if it is not there, cut behind its last whole batch if it is.
      problems: P.
      num_responses: K.
      batch: problems that are written together.

    Attributes:
      summaries: of every response in the file, in order.

    Raises:
      UserError: a line before the last is not a response, or not the one that belongs there.
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
        """Problems whose responses are all there."""
        return len(self.summaries) // self._K

    def clear(self) -> None:
        """Removes all responses, so that the same command asks anew."""
        self._file.truncate(0)
        self.summaries.clear()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes one batch, and returns when it is on the disk. Raises `UserError` if it cannot be written."""
        records = list(records)
        try:
            append(self._file, b"".join(map(dump_line, records)))
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.summaries += map(_summary, records)

    def _read(self) -> int:
        """Fills `summaries` with the whole batches; returns where the last one ends."""

        def check(record: Any) -> None:
            if (record["id"], record["k"]) != divmod(len(self.summaries), self._K):
                raise ValueError("another response belongs here")
            self.summaries.append(_summary(record))

        end = whole = position = 0
        for line, _ in read_lines(self.path, check, may_be_torn=True, remedy="remove the file to ask anew"):
            position += len(line)
            if not line.endswith(b"\n"):
                break  # whole but for its newline: the batch is done again
            if len(self.summaries) % self._unit == 0 or len(self.summaries) == self._total:
                end, whole = position, len(self.summaries)
        del self.summaries[whole:]
        return end


def _summary(record: Mapping[str, Any]) -> ResponseSummary:
    answer = record["parts"].get("answer")
    # A function of the user's own may name a number; JSON has no text for one.
    answer = None if answer is None else str(answer)
    reason = record["parts"].get("reason") if record["outcome"] == "infrastructure" else None
    return ResponseSummary(
        record["outcome"], answer, record["score"], record["tokens"], record["finished"], reason
    )
