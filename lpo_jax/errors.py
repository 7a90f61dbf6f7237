"""The exceptions that the command line reports as one line instead of a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can correct, found before work begins.

    The message is one line: what is wrong, where, and what to do. The exit status is 2.
    """


class RunStopped(Exception):
    """A run that cannot continue. The message gives the reason and what has been saved. The exit status is 1."""


class Diverged(RunStopped):
    """A run that was stopped because consecutive gradients were not finite."""


class VerifierFailed(RunStopped):
    """A run that was stopped because the verifier failed on every response of a step or an evaluation."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` with the known name most similar to `name`, or `""` if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
