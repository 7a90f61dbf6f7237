"""A bound on the processor time of a piece of work, from inside the process that does it."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

_TICK = 0.05  # seconds of processor time between two looks at the clock


class OutOfTime(BaseException):
    """The block has used up its processor time. No `Exception`, for libraries catch those and go on."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the block once this thread has spent that much processor time in it.

    Processor time, so that a busy machine changes no verdict. The exception comes again at every tick until
    the block is left, should something in it swallow the first. It comes between two steps of the interpreter:
    a single long operation in C is for the pool's wall clock to end. Signals only reach the main thread (where
    a pool's worker judges); in another thread the block runs without this limit.

    Args:
      seconds: of processor time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deadline = time.thread_time() + seconds

    def look(number, frame):
        if time.thread_time() >= deadline:  # the timer counts the other threads too
            raise OutOfTime(f"more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, _TICK, _TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        # A last tick may still be on its way (to any thread), and by default it would end the process.
        signal.signal(signal.SIGPROF, signal.SIG_IGN if before == signal.SIG_DFL else before)
