"""The exceptions that the command line turns into one line instead of a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend, found before work begins. Its text is one line: what, where, what to do.

    Exit status 2.
    """


class RunStopped(Exception):
    """A run that cannot go on, for a reason found while it ran. Its text says what is saved. Exit status 1."""


class Diverged(RunStopped):
    """A run that had nothing to learn from any more: one gradient after another was not finite."""


class VerifierFailed(RunStopped):
    """A verifier failed on every response of a step or an evaluation."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name closest to `name`, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
