"""The verdict of a verifier on one response."""

import dataclasses
import math
import numbers
import struct
from collections.abc import Callable, Mapping

from lpo_jax.types import Json

OUTCOMES = ("pass", "wrong", "malformed", "timeout", "infrastructure")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The reward of one response, and the reason for it.

    Attributes:
      reward: the reward, finite in float32.
      outcome: one of `OUTCOMES`.
        `pass`, `wrong`: the response has an answer, which was judged.
        `malformed`: the response has no answer in the required form.
        `timeout`: the response's own program or expression ran out of time. This is the response's fault, so it is
          scored.
        `infrastructure`: the verifier failed: it hung, died or raised an exception. This carries no information about
          the response, so the sample is masked out of the simplex and counted; it is never silently scored 0.
      parts: details for the rollout files, such as the extracted `answer` and the `reason`.

    Raises:
      ValueError: if the outcome is unknown.
    """

    reward: float
    outcome: str
    parts: dict[str, float | str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome {self.outcome!r} is not one of {', '.join(OUTCOMES)}")

    @property
    def masked(self) -> bool:
        """Whether the sample must be excluded from training: true exactly for the outcome `infrastructure`."""
        return self.outcome == "infrastructure"


def infrastructure(reason: str) -> Verdict:
    """Return the verdict on a sample that could not be judged, with the reason."""
    return Verdict(0.0, "infrastructure", {"reason": reason})


def unusable(reward: float) -> str:
    """Return why a reward cannot be used for training, which computes in float32; empty if it can."""
    if not math.isfinite(reward):
        return f"verifier returned the reward {reward}, which is not finite"
    try:
        struct.pack("<f", reward)
    except OverflowError:
        return f"verifier returned the reward {reward:g}, which is beyond the range of float32"
    return ""


def as_verdict(value: Json) -> Verdict:
    """Convert the return value of a verifier to a verdict whose reward is finite in float32.

    Args:
      value: a `Verdict` or a real number. A number counts as `pass` if it is at least 1, else as `wrong`. A verifier
        whose scores mean something else returns a `Verdict`.

    Returns:
      The verdict. Its outcome is `infrastructure`, with a reason, if the reward is not a real number or not finite in
      float32.
    """
    if isinstance(value, Verdict):
        reward, outcome, parts = value.reward, value.outcome, value.parts
    else:
        reward, outcome, parts = value, None, {}
    if not isinstance(reward, numbers.Real):
        return infrastructure(f"verifier returned {type(reward).__name__}, not a number or a Verdict")
    try:
        reward = float(reward)
    except OverflowError:
        reward = math.inf
    if reason := unusable(reward):
        return infrastructure(reason)
    return Verdict(reward, outcome or ("pass" if reward >= 1 else "wrong"), _plain(parts))


def _plain(parts: Mapping[str, Json]) -> dict[str, float | str]:
    """Convert parts to text and floats, so that JSON lines hold them unchanged."""
    return {str(k): float(v) if isinstance(v, numbers.Real) else str(v) for k, v in parts.items()}


Verifier = Callable[[str, Mapping[str, Json]], Verdict]


@dataclasses.dataclass(frozen=True)
class VerifierDescriptor:
    """How to build a verifier, and what the pool and its workers must provide for it.

    Every verifier's file exports one as `DESCRIPTOR`; `registry.py` collects them.

    Attributes:
      name: the name in configs and in `rewards.get`.
      build: builds the verifier from its options, which are keyword arguments.
      fields: the fields that every data row must have.
      slow_imports: modules that a worker imports before its first response, so that the import time counts against no
        response.
      memory: bytes that a worker may allocate; None for no limit.
      least_timeout: seconds that the pool must allow for a response. With less, the pool would mask slow answers before
        the verifier's own time limit scores them.
      confine: for verifiers that run programs, `(options, allow_weak, timeout) -> (options, kind)`: sets the sandbox
        and the time limit in the options and returns the kind of sandbox; see `VerifierSpec.confined`. None for all
        others.
    """

    name: str
    build: Callable[..., Verifier]
    fields: tuple[str, ...] = ()
    slow_imports: tuple[str, ...] = ()
    memory: int | None = None
    least_timeout: float = 0.0
    confine: Callable[[Mapping[str, Json], bool, float], tuple[dict[str, Json], str]] | None = None
