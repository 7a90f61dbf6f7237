"""Verifiers in processes that can be killed.

The parent holds the clock: a worker that takes longer than the limit over one item is killed with all it
started and replaced, and the item's verdict is `infrastructure`. Workers are started by `python -c`, never
forked (a fork of a process that runs jax may deadlock) and not by `multiprocessing` (which would run the
user's main script again).
"""

import contextlib
import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError
from lpo_jax.rewards.code import confine
from lpo_jax.rewards.registry import VerifierSpec
from lpo_jax.rewards.verdict import Verdict, infrastructure
from lpo_jax.rewards.worker import HEADER, frame

# The worker sees the same modules as the parent; -P keeps the current folder from shadowing any before that.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; from lpo_jax.rewards.worker import main; main(sys.argv[1])"
)
# A user's verifier may import jax or numpy: never on the accelerator, never a thread per core in each worker.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
_START_ATTEMPTS = 3
_GRACE = 0.2  # seconds between SIGTERM and SIGKILL


class _Worker:
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
        self.deadline: float | None = time.monotonic() + start_limit
        self.unsent = self.unread = b""
        self.send((spec, start_limit, item_limit))

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None

    def send(self, message: Any) -> None:
        self.unsent += frame(pickle.dumps(message))
        self.flush()

    def flush(self) -> None:
        """Writes what the line takes now: a worker that does not read must not stop the parent."""
        try:
            self.unsent = self.unsent[self.line.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent = b""  # the worker is dead, which the reading side reports

    def receive(self) -> tuple[dict | None, bool]:
        """The reply if it has come whole, and whether the worker is gone. Never waits for the rest of one."""
        try:
            data = self.line.recv(1 << 20)
        except BlockingIOError:
            return None, False
        except OSError:
            return None, True
        self.unread += data
        if len(self.unread) < HEADER.size:
            return None, not data
        (length,) = HEADER.unpack_from(self.unread)
        if len(self.unread) < HEADER.size + length:
            return None, not data
        payload = self.unread[HEADER.size : HEADER.size + length]
        self.unread = self.unread[HEADER.size + length :]
        return json.loads(payload), False

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


def _stop_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked copy of the trainer ends; the workers are not its own
    for worker in workers:
        worker.line.close()  # all leave at once, and are then collected one by one
    while workers:
        worker = workers.pop()
        worker.stop(wait=1.0 if worker.idle else 0.0)


class Judging:
    """Responses that are judged while others are still to come; made by `VerifierPool.judging`."""

    def __init__(self):
        self.items: list[tuple[str, Mapping[str, Any]]] = []
        self.settled: dict[int, Verdict] = {}
        self.complete = False  # nothing more will be submitted
        self.error: BaseException | None = None
        self.bell, self.ring = socket.socketpair()  # wakes the thread that waits for workers
        for end in (self.bell, self.ring):
            end.setblocking(False)

    def submit(self, response: str, example: Mapping[str, Any]) -> None:
        """Hands in one response (without prompt and prefill) to the data row `example`; returns at once."""
        self.items.append((response, example))
        self.wake()

    @property
    def verdicts(self) -> list[Verdict]:
        """In the order of submission, once the `with` is left."""
        return [self.settled[item] for item in range(len(self.items))]

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been rung often enough
            self.ring.send(b"!")


class VerifierPool:
    """Runs one verifier in worker processes, each item under a wall-clock limit.

    Use it as a context manager, or call `close`; leaving the interpreter closes it too. An exception inside
    `verify` or `judging` (Ctrl-C, say) closes it at once. Safe to use from several threads, one call at a time.

    Args:
      verifier: a `VerifierSpec`, or its source alone.
      workers: number of processes, at all times; by default one a core, at most 8.
      timeout: seconds of wall clock for one item.
      recycle_after: items after which a worker is replaced by a fresh one, so that leaks stay bounded.
      start_timeout: seconds for a worker to import the verifier.
      allow_weak_sandbox: whether the code verifier may run programs where they cannot be kept from reading
        this user's files; see `sandbox.py`. Others run none.

    Attributes:
      sandbox: the kind of sandbox that programs run in; empty for a verifier that runs none.

    Raises:
      UserError: if an argument makes no sense, the verifier cannot be loaded, or programs cannot be confined;
        known before the constructor returns.
    """

    def __init__(
        self,
        verifier: VerifierSpec | str,
        *,
        workers: int | None = None,
        timeout: float = 5.0,
        recycle_after: int = 10_000,
        start_timeout: float = 60.0,
        allow_weak_sandbox: bool = False,
    ):
        workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        if workers < 1 or timeout <= 0 or recycle_after < 1 or start_timeout <= 0:
            raise UserError(
                f"rewards: workers {workers}, timeout {timeout}, recycle_after {recycle_after}, "
                f"start_timeout {start_timeout}: all must be positive"
            )
        spec = VerifierSpec(verifier) if isinstance(verifier, str) else verifier
        self._spec, self.sandbox = confine(spec, allow_weak=allow_weak_sandbox, timeout=timeout)
        self._timeout, self._recycle_after, self._start_timeout = timeout, recycle_after, start_timeout
        self._lock = threading.Lock()
        self._attempts = (
            1  # at first a worker that does not start is an error; in a long run it gets more tries
        )
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        self._job: Judging | None = None
        self._close = weakref.finalize(self, _stop_all, self._workers, os.getpid())
        try:
            self._workers.extend(self._start() for _ in range(workers))
            while not all(worker.ready for worker in self._workers):
                self._step()
            self._attempts = _START_ATTEMPTS
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers and waits for them. Calling it again does nothing."""
        self._close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, for logs and tests."""
        return [worker.process.pid for worker in self._workers]

    def verify(self, responses: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Judges responses, in parallel.

        Args:
          responses: texts, without prompt and prefill.
          examples: the data row of each.

        Returns:
          Verdicts in the order of the responses, the same for any number of workers. One that could not be
          reached (the verifier raised, hung, died, or returned no finite number) is `infrastructure` and
          `masked`.

        Raises:
          ValueError: if the lengths differ.
          RuntimeError: if the pool is closed.
          UserError: if workers die again and again while they start.
        """
        if len(responses) != len(examples):
            raise ValueError(f"{len(responses)} responses but {len(examples)} examples")
        job = Judging()
        job.items, job.complete = list(zip(responses, examples)), True
        with self._alone(job):
            self._judge(job)
        return job.verdicts

    @contextlib.contextmanager
    def judging(self) -> Iterator[Judging]:
        """Judges what is submitted inside the `with` while its body goes on; leaving it waits for the rest.

        The verdicts are those of `verify`, whose guarantees hold here too.

        Raises:
          RuntimeError: if the pool is closed.
          UserError: if workers die again and again while they start.
        """
        job = Judging()
        with self._alone(job):
            thread = threading.Thread(target=self._judge_apart, args=(job,), daemon=True)
            thread.start()
            try:
                yield job
                job.complete = True
                job.wake()
                thread.join()
            except BaseException as error:
                job.error = job.error or error
                raise
            finally:
                job.wake()
                thread.join()  # on an error at once: nobody else may touch the workers that are closed then
            if job.error:
                raise job.error

    @contextlib.contextmanager
    def _alone(self, job: Judging) -> Iterator[None]:
        with self._lock, job.bell, job.ring:
            if not self._close.alive:
                raise RuntimeError("the verifier pool is closed")
            self._job = job
            try:
                yield
            except BaseException:
                self.close()  # items are still out: their replies would be taken for those of the next call
                raise
            finally:
                self._job = None

    def _judge_apart(self, job: Judging) -> None:
        try:
            self._judge(job)
        except BaseException as error:
            job.error = job.error or error

    def _judge(self, job: Judging) -> None:
        """Settles items until there are no more to come."""
        given = 0
        if job.items or not job.complete:
            self._step(wait=0)  # workers that died since the last call must not cost an item
        while not job.error and not (job.complete and len(job.settled) == len(job.items)):
            for worker in self._workers:
                if worker.idle and given < len(job.items):
                    worker.item, given = given, given + 1
                    worker.deadline = time.monotonic() + self._timeout
                    worker.send(job.items[worker.item])
            job.settled.update(self._step())

    def _start(self) -> _Worker:
        return _Worker(self._spec, self._start_timeout, self._timeout)

    def _step(self, wait: float | None = None) -> list[tuple[int, Verdict]]:
        """Waits until a worker replies, dies or is out of time, and deals with it; returns settled items.

        Args:
          wait: seconds to wait at most; None: until the next deadline, or until the bell rings.
        """
        if wait is None:
            deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
            wait = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        settled = []
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
                selector.register(worker.line, events, worker)
            if self._job:
                selector.register(self._job.bell, selectors.EVENT_READ)
            happened = {key.data: events for key, events in selector.select(wait)}
        if None in happened:
            self._job.bell.recv(1 << 16)
        # A reply that is here counts, even if the parent was itself late to look: so first read, then hold
        # against the clock of that look, for ending one worker takes time in which others may reply.
        now = time.monotonic()
        for slot, worker in enumerate(self._workers):
            events = happened.get(worker, 0)
            if events & selectors.EVENT_WRITE:
                worker.flush()
            reply, gone = worker.receive() if events & selectors.EVENT_READ else (None, False)
            if reply is not None:
                settled += self._reply(slot, reply)
            elif gone:
                settled += self._replace(slot, None)
            elif worker.deadline is not None and now >= worker.deadline:
                limit = self._timeout if worker.ready else self._start_timeout
                settled += self._replace(slot, f"wall-clock limit of {limit:g} s")
        return settled

    def _reply(self, slot: int, reply: dict) -> list[tuple[int, Verdict]]:
        worker = self._workers[slot]
        worker.deadline = None
        if not worker.ready:
            if "error" in reply:
                raise UserError(reply["error"])
            worker.ready, self._failed_starts = True, 0
            return []
        settled = [(worker.item, Verdict(**reply))]
        worker.item = None
        worker.judged += 1
        if worker.judged >= self._recycle_after:
            worker.stop(wait=1.0)
            self._workers[slot] = self._start()
        return settled

    def _replace(self, slot: int, reason: str | None) -> list[tuple[int, Verdict]]:
        """Puts a fresh worker in place of one that hangs (with its reason) or died (None)."""
        worker = self._workers[slot]
        ended = worker.stop(wait=0.0 if reason else 1.0)
        reason = reason or f"worker died ({ended})"
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= self._attempts:
                raise UserError(f"verifier {self._spec.source}: its worker does not start: {reason}")
        settled = [] if worker.item is None else [(worker.item, infrastructure(reason))]
        self._workers[slot] = self._start()
        return settled
