"""Find where the text of a response first contains a stop string."""

import functools
from collections.abc import Callable, Sequence

from lpo_jax.errors import UserError

# Takes the token ids of a response and the number of new ones; returns the length at which it stops, or None.
StopFinder = Callable[[list[int], int], int | None]


def find_stop(
    decode: Callable[[list[int]], str], stop: Sequence[str], ids: list[int], new: int
) -> int | None:
    """Return the smallest number of tokens whose text contains a stop string, or None.

    Args:
      decode: token ids to text.
      new: number of tokens that have not been searched yet. A stop string can only end in one of these, or in an older
        token whose text they complete.
    """
    contains = lambda n: any(s in decode(ids[:n]) for s in stop)  # noqa: E731
    if not contains(len(ids)):
        return None
    n = max(1, len(ids) - 2 * new)
    while not contains(n):
        n += 1
    while n > 1 and contains(n - 1):
        n -= 1
    return n


def stop_finder(decode: Callable[[list[int]], str] | None, stop: Sequence[str]) -> StopFinder | None:
    """Return `find_stop` for one tokenizer and its stop strings, or None if there are no stop strings.

    Raises:
      UserError: one of the strings is empty.
    """
    if "" in stop:
        raise UserError("stop: an empty string would end every response at its first token; leave it out")
    return functools.partial(find_stop, decode, stop) if stop else None
