"""The descriptor that each verifier's file exports."""

import dataclasses
from collections.abc import Callable, Mapping

from lpo_jax.rewards.verdict import Verdict
from lpo_jax.types import Json

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
