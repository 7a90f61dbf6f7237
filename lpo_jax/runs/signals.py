"""Signals that stop a run: they take effect where no state is half updated."""

import contextlib
import signal
import sys

from lpo_jax.parallel import hosts
from lpo_jax.types import PyTree

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """SIGTERM, Ctrl-C or a closed terminal; raised only where no state is half updated.

    Like KeyboardInterrupt it is not an `Exception`, so that no library handles it as an error of its own.
    """


class Signals:
    """Turns SIGTERM, SIGINT and SIGHUP into `Interrupted`.

    It is raised at once in phases that change no state (sampling, verifying, evaluating), and at the end of a
    `deferred` block in those that do. With many hosts it is raised only in `agree`, which all of them call together,
    because a host that stopped alone would leave the others waiting. A second signal ends the process at once, except
    a second SIGHUP.
    """

    def __init__(self):
        self._waiting = self._deferred = False
        self._many = hosts.many()

    def __enter__(self):
        # SIGHUP stays ignored under nohup.
        obeyed = [s for s in STOPPING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._handle) for s in obeyed}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *_):
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self):
        """A block that ends before a signal takes effect."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._waiting and not self._many:
            raise Interrupted

    def _unraisable(self, unraisable: PyTree) -> None:
        # Python prints and drops an exception that is raised in a finaliser or in a callback of the garbage collector.
        # The signal is not lost: it takes effect at the end of the next deferred block.
        if not issubclass(unraisable.exc_type, Interrupted):
            self._hook(unraisable)

    def agree(self) -> None:
        """Raise `Interrupted` on all hosts if any has received a signal; called by all together, between two steps."""
        if self._many and any(hosts.gather(self._waiting)):
            raise Interrupted

    def _handle(self, number, frame):
        for again, handler in self._before.items():
            # The shell and the kernel both send SIGHUP: a second one does not mean to end without saving.
            signal.signal(again, signal.SIG_IGN if again == signal.SIGHUP else handler)
        self._waiting = True
        if not self._deferred and not self._many:
            raise Interrupted
