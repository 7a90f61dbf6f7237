"""What a verifier says about one response."""

import dataclasses
import math
import numbers
import struct
from collections.abc import Mapping
from typing import Any

OUTCOMES = ("pass", "wrong", "malformed", "timeout", "infrastructure")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The reward of one response, and why.

    Outcomes: `pass` and `wrong` are answers that could be judged; `malformed` holds no answer in the asked
      form;
    `timeout` is a response whose own program ran out of time, which is the response's fault and is scored;
    `infrastructure` means that the verifier failed (hung, died, raised). That says nothing about the
    response, so the sample is masked out of the simplex and counted, never scored 0 in silence.
    """

    reward: float
    outcome: str
    parts: dict[str, float | str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome {self.outcome!r} is not one of {', '.join(OUTCOMES)}")

    @property
    def masked(self) -> bool:
        """Whether the sample must be left out of training: true exactly for `infrastructure`."""
        return self.outcome == "infrastructure"


def infrastructure(reason: str) -> Verdict:
    """The verdict on a sample that could not be judged."""
    return Verdict(0.0, "infrastructure", {"reason": reason})


def unusable(reward: float) -> str:
    """Why a reward cannot be trained on; empty if it can. Training computes in float32."""
    if not math.isfinite(reward):
        return f"verifier returned the reward {reward}, which is not finite"
    try:
        struct.pack("<f", reward)
    except OverflowError:
        return f"verifier returned the reward {reward:g}, which is beyond the range of float32"
    return ""


def as_verdict(value: Any) -> Verdict:
    """Turns what a verifier returned into a verdict with a reward that is finite in float32.

    Args:
      value: a `Verdict`, or a real number. A number of 1 or more is a `pass`, a smaller one is `wrong`; a
        verifier with other scores returns a `Verdict` and says so itself.

    Returns:
      The verdict; `infrastructure` with a reason when the reward is not a real number, or `unusable`.
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


def _plain(parts: Mapping[str, Any]) -> dict[str, float | str]:
    """Parts as text and floats, so that they go into a JSON line unchanged."""
    return {str(k): float(v) if isinstance(v, numbers.Real) else str(v) for k, v in parts.items()}
