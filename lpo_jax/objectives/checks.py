"""Helpers for checking what a user wrote."""

import difflib
import numbers
from collections.abc import Iterable
from typing import TypeGuard


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return `"; did you mean 'x'?"` for the known name closest to `name`, or `""` when none is close."""
    close = difflib.get_close_matches(str(name), [k for k in known if isinstance(k, str)], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number, of Python or of numpy; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
