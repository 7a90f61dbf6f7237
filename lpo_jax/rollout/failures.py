"""Responses that no verifier judged: how many, why, and whether a run can go on.

An `infrastructure` verdict masks its sample, because it contains no information about the response. A verifier that
fails on every response therefore leaves nothing to learn from and nothing to score, and the run must stop.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from lpo_jax.errors import VerifierFailed
from lpo_jax.rewards import Verdict

WARN_ABOVE = 0.05  # share of masked responses
QUIET = 10  # steps or evaluations within which a warning with the same reason is not repeated


@dataclasses.dataclass(frozen=True)
class Failures:
    """Counts of the responses of a step or an evaluation that no verifier judged.

    Attributes:
      responses: how many there are.
      reasons: reason -> how many of them were masked for it.
    """

    responses: int
    reasons: Mapping[str, int]

    @property
    def masked(self) -> int:
        """Responses that could not be judged."""
        return sum(self.reasons.values())

    @property
    def share(self) -> float:
        """Share of masked responses; 0 if there are no responses."""
        return self.masked / max(self.responses, 1)

    @property
    def reason(self) -> str:
        """The most frequent reason; empty if no response was masked."""
        return max(self.reasons, key=self.reasons.__getitem__, default="")


def failures(verdicts: Iterable[Verdict]) -> Failures:
    """Count the masked responses and their reasons."""
    verdicts = list(verdicts)
    reasons = (str(v.parts.get("reason") or "no reason was given") for v in verdicts if v.masked)
    return Failures(len(verdicts), dict(collections.Counter(reasons)))


def require_judged(found: Failures, where: str) -> None:
    """Stop a run or an evaluation of which no response was judged.

    Args:
      where: the step or the evaluation, for the message.

    Raises:
      VerifierFailed: every one of the responses was masked.
    """
    if found.responses and found.masked == found.responses:
        raise VerifierFailed(
            f"{where}: the verifier failed on all {found.responses} responses, so there is nothing to go on with: "
            f"{found.reason}; repair it and give the same command again (a run with --resume)"
        )


def warning(found: Failures, where: str) -> str | None:
    """Return a one-line warning if the share of masked responses exceeds `WARN_ABOVE`, else None."""
    if found.share <= WARN_ABOVE:
        return None
    return (
        f"warning: {where}: the verifier failed on {found.masked} of {found.responses} responses, which are masked; "
        f"most often: {found.reason}"
    )


class Watch:
    """Checks consecutive steps and evaluations, without repeating the same warning each time."""

    def __init__(self):
        self._checked, self._warned = 0, {}

    def check(self, found: Failures, where: str) -> str | None:
        """Return the warning that is due, if any. Raises `VerifierFailed` like `require_judged`."""
        require_judged(found, where)
        message, self._checked = warning(found, where), self._checked + 1
        if message and self._checked - self._warned.get(found.reason, -QUIET) >= QUIET:
            self._warned[found.reason] = self._checked
            return message
        return None
