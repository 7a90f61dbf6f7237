"""What a verifier's file declares about it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lpo_jax.rewards.verdict import Verdict

Verifier = Callable[[str, Mapping[str, Any]], Verdict]


@dataclasses.dataclass(frozen=True)
class VerifierDescriptor:
    """A verifier and what the pool and its workers must provide for it.

    Every verifier file exports one as `DESCRIPTOR`; `registry.py` collects them.

    Attributes:
      name: the name in configs and in `rewards.get`.
      build: makes the verifier from its options, given as keyword arguments.
      fields: fields that a data row must have.
      slow_imports: modules that a worker imports before its first response, so that no response is charged for it.
      memory: bytes that a worker may allocate; None for no limit.
      least_timeout: seconds that the pool must allow for a response. With less, the pool would mask slow answers before
        the verifier's own limit can score them.
      confine: `(options, allow_weak, timeout) -> (options, kind)` for verifiers that run programs: settles the sandbox
        and the time limit, and returns the kind of sandbox; see `VerifierSpec.confined`. None for the other verifiers.
    """

    name: str
    build: Callable[..., Verifier]
    fields: tuple[str, ...] = ()
    slow_imports: tuple[str, ...] = ()
    memory: int | None = None
    least_timeout: float = 0.0
    confine: Callable[[Mapping[str, Any], bool, float], tuple[dict[str, Any], str]] | None = None
