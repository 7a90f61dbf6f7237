"""A limit on processor time, enforced from inside the process that does the work."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

_TICK = 0.05  # seconds of processor time between two checks of the clock


class OutOfTime(BaseException):
    """The block has used up its processor time. Not an `Exception`, because libraries catch those and continue."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` inside the `with` block once this thread has used the given processor time in it.

    The limit is on processor time, so that a busy machine changes no verdict. If code in the block swallows the
    exception, it is raised again at every tick until the block is left. It is raised between two steps of the
    interpreter; a single long operation in C is ended only by the pool's wall-clock limit. Signals reach only the main
    thread, where a worker runs its verifier; in any other thread the block has no limit.

    Args:
      seconds: the limit in seconds of processor time.

    Raises:
      OutOfTime: when the limit is reached.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deadline = time.thread_time() + seconds

    def check_time(number, frame):
        if time.thread_time() >= deadline:  # the timer also counts the other threads
            raise OutOfTime(f"more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, check_time)
    signal.setitimer(signal.ITIMER_PROF, _TICK, _TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        # A last signal may still be pending (in any thread); the default action would end the process.
        signal.signal(signal.SIGPROF, signal.SIG_IGN if before == signal.SIG_DFL else before)
