"""The end of an error message about a wrong name."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[object]) -> str:
    """`"; did you mean 'x'?"` for the known name closest to `name`, or `""` when none is close."""
    known = [k for k in known if isinstance(k, str)]
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
