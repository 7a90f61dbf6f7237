"""The pool's half of a worker: its process, the socket to it, and what has come over that socket."""

import contextlib
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from lpo_jax.rewards.registry import VerifierSpec
from lpo_jax.rewards.verdict import Verdict
from lpo_jax.rewards.worker import HEADER, MAX_REPLY, frame, parse_reply

# The worker sees the same modules as the parent; -P keeps the current folder from shadowing any before that.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]\n"
    "from lpo_jax.rewards.worker import run_worker; run_worker(sys.argv[1])"
)
# A user's verifier may import jax or numpy: never on the accelerator, never a thread per core in each worker.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
_GRACE = 0.2  # seconds between SIGTERM and SIGKILL
_ASLEEP = 1.0  # a pool that finds a deadline this many seconds past was itself stopped (SIGSTOP) in between,
_REPRIEVE = 1.0  # and then gives a worker this many more, for a reply that the pool had not read in time


class BadReply(Exception):
    """The line to a worker holds something that is not a reply to a request."""


class WorkerProcess:
    """One process, the line to it, and what it does: it starts, idles, or judges `item` until `deadline`."""

    def __init__(self, spec: VerifierSpec, start_limit: float, item_limit: float):
        self.line, theirs = socket.socketpair()
        self.line.setblocking(False)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a verifier's prints belong with the log, not in the program's output
                env=os.environ | _ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # out of reach of the terminal's Ctrl-C, and a group to kill as one
            )
        self.ready = False
        self.item: int | None = None
        self.judged = 0
        self.suspect = False  # it has said more than it was asked: replaced as soon as it is free
        self.unsent, self.unread = b"", bytearray()
        self._nonce, self._requests, self._open = secrets.token_hex(8), 0, False
        self.ask(start_limit, spec, start_limit, item_limit)

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None

    def ask(self, limit: float, *message: Any) -> None:
        """Sends a request, whose reply is due within `limit` seconds."""
        self._requests += 1
        self._open, self._reprieved = True, False
        self.deadline: float | None = time.monotonic() + limit
        self.unsent += frame(pickle.dumps((f"{self._nonce}:{self._requests}", *message)))
        self.flush()

    def flush(self) -> None:
        """Writes what the line takes now: a worker that does not read must not stop the parent."""
        try:
            self.unsent = self.unsent[self.line.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent = b""  # the worker is dead, which the reading side reports

    def receive(self) -> bool:
        """Reads what the line holds, without waiting for more; returns whether the worker still has its end."""
        while len(self.unread) <= MAX_REPLY + HEADER.size:
            try:
                data = self.line.recv(1 << 20)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self.unread += data
        return True

    def reply(self) -> tuple[Verdict | str | None] | None:
        """What the worker has replied to the open request (see `parse_reply`), once that has come whole.

        A further reply to a request that has one already is dropped.

        Raises:
          BadReply: if something else is on the line.
        """
        while (payload := self._payload()) is not None:
            try:
                token, content = parse_reply(payload)
                nonce, _, number = token.partition(":")
                number = int(number)
            except ValueError as error:
                raise BadReply(f"{error}") from None
            if nonce != self._nonce or not 0 < number <= self._requests:
                raise BadReply("a reply to no request of the pool")
            if number == self._requests and self._open:
                self._open, self.deadline = False, None
                self.suspect |= bool(self.unread)
                return (content,)
            self.suspect = True
        self.suspect |= bool(self.unread) and not self._open
        return None

    def _payload(self) -> bytes | None:
        """Takes the next whole message off what has been read."""
        if len(self.unread) < HEADER.size:
            return None
        (length,) = HEADER.unpack_from(self.unread)
        if length > MAX_REPLY:
            raise BadReply("no length of a reply")
        end = HEADER.size + length
        if len(self.unread) < end:
            return None
        payload = bytes(self.unread[HEADER.size : end])
        del self.unread[:end]
        return payload

    def reprieve(self, now: float) -> bool:
        """Moves the deadline, once, if the pool itself was stopped when it passed; returns whether it did."""
        if self._reprieved or now - self.deadline < _ASLEEP:
            return False
        self._reprieved, self.deadline = True, time.monotonic() + _REPRIEVE
        return True

    def stop(self, wait: float) -> str:
        """Ends the process and all it started; returns how it ended.

        Args:
          wait: seconds in which an idle worker may leave by itself, once the line is closed.
        """
        self.line.close()
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            self._kill_group(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)
        self._kill_group(signal.SIGKILL)  # itself if it is still there, and whatever it leaves behind
        return f"exit {self.process.wait()}"

    def _kill_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody left in the group
            os.killpg(self.process.pid, number)
