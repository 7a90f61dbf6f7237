"""Where a response's text first holds a stop string."""

import functools
from collections.abc import Callable, Sequence

from lpo_jax.errors import UserError


def completes(
    decode: Callable[[list[int]], str], stop: Sequence[str], ids: list[int], new: int
) -> int | None:
    """The fewest tokens whose text holds a stop string, None if all of them do not.

    Args:
      new: only the last so many tokens, and a token that they complete, can hold the first one.
    """
    holds = lambda n: any(s in decode(ids[:n]) for s in stop)  # noqa: E731
    if not holds(len(ids)):
        return None
    n = max(1, len(ids) - 2 * new)
    while not holds(n):
        n += 1
    while n > 1 and holds(n - 1):
        n -= 1
    return n


def stopper(decode, stop: Sequence[str]):
    """`completes` for one sampler and its stop strings; None where there are none."""
    if "" in stop:
        raise UserError("stop: an empty string would end every response at its first token; leave it out")
    return functools.partial(completes, decode, stop) if stop else None
