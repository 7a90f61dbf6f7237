"""The pool's side of a worker: its process, the socket to it, and the replies received over that socket."""

import contextlib
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import time

from lpo_jax.rewards.registry import VerifierSpec
from lpo_jax.rewards.verdict import Verdict
from lpo_jax.rewards.worker import HEADER, MAX_REPLY, frame, parse_reply
from lpo_jax.types import Json

# The worker has the same module path as the parent. -P keeps the current folder from shadowing modules before it is
# set.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]\n"
    "from lpo_jax.rewards.worker import run_worker; run_worker(sys.argv[1])"
)
# A user's verifier may import JAX or NumPy, but must not use the accelerator or start a thread per core in each worker.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
_GRACE = 0.2  # seconds between SIGTERM and SIGKILL
_STOPPED = 1.0  # if a deadline passed this many seconds ago, the pool itself must have been stopped (SIGSTOP)
_EXTENSION = 1.0  # seconds that a worker then gets, for a reply that the pool has not read in time


class BadReply(Exception):
    """The socket to a worker holds something other than a reply to a request."""


class WorkerProcess:
    """One worker process and the socket to it. The worker is starting, idle, or judging `item` until `deadline`.

    Args:
      spec: the verifier to load.
      start_limit: seconds in which the worker must be ready.
      item_limit: seconds for one item.
    """

    def __init__(self, spec: VerifierSpec, start_limit: float, item_limit: float):
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=2,  # output that a verifier prints goes to the log, not to the program's stdout
                env=os.environ | _ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # not reached by the terminal's Ctrl-C, and can be killed as a group
            )
        self.ready = False
        self.item: int | None = None
        self.judged = 0
        self.suspect = False  # True if it has sent more than its replies; it is replaced once it is idle
        self.unsent, self.unread = b"", bytearray()
        self._nonce, self._requests, self._open = secrets.token_hex(8), 0, False
        self.request(start_limit, spec, start_limit, item_limit)

    @property
    def idle(self) -> bool:
        """Whether the worker is ready and judges no item."""
        return self.ready and self.item is None

    def request(self, limit: float, *message: Json) -> None:
        """Send a request whose reply is due within `limit` seconds."""
        self._requests += 1
        self._open, self._extended = True, False
        self.deadline: float | None = time.monotonic() + limit
        self.unsent += frame(pickle.dumps((f"{self._nonce}:{self._requests}", *message)))
        self.flush()

    def flush(self) -> None:
        """Send as much as possible without blocking: a worker that does not read must not block the parent."""
        try:
            self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent = b""  # the worker has died, which `receive` reports

    def receive(self) -> bool:
        """Read what has arrived, without blocking; return whether the worker still has its end of the socket open."""
        while len(self.unread) <= MAX_REPLY + HEADER.size:
            try:
                data = self.socket.recv(1 << 20)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self.unread += data
        return True

    def reply(self) -> tuple[Verdict | str | None] | None:
        """Return the content of the reply to the open request (see `parse_reply`) as a 1-tuple.

        Return None until that reply has arrived completely. Surplus replies to earlier requests are dropped.

        Raises:
          BadReply: if the socket holds anything else.
        """
        while (payload := self._payload()) is not None:
            try:
                token, content = parse_reply(payload)
                nonce, _, text = token.partition(":")
                number = int(text)
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
        """Remove the next complete message from the bytes received, and return it."""
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

    def extend_deadline(self, now: float) -> bool:
        """Extend the deadline once if the pool itself was stopped when it passed; return whether it was extended."""
        if self._extended or now - self.deadline < _STOPPED:
            return False
        self._extended, self.deadline = True, time.monotonic() + _EXTENSION
        return True

    def stop(self, wait: float) -> str:
        """End the process and all processes that it started.

        Args:
          wait: seconds in which an idle worker may exit by itself after the socket is closed.

        Returns:
          How the process ended, such as `"exit -9"`.
        """
        self.socket.close()
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            self._kill_group(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)
        self._kill_group(signal.SIGKILL)  # the process, if it still runs, and any processes it leaves behind
        return f"exit {self.process.wait()}"

    def _kill_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is empty
            os.killpg(self.process.pid, number)
