"""Verifiers in processes that can be killed.

The parent holds the clock: a worker that takes longer than the limit over one item is killed with all it
started and replaced, and the item's verdict is `infrastructure`. Workers are started by `python -c`, never
forked (a fork of a process that runs jax may deadlock) and not by `multiprocessing` (which would run the
user's main script again).
"""

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError
from lpo_jax.rewards.registry import VerifierSpec
from lpo_jax.rewards.verdict import Verdict, infrastructure
from lpo_jax.rewards.worker_process import BadReply, WorkerProcess

_START_ATTEMPTS = 3

_log = logging.getLogger(__name__)


def _stop_all(workers: list[WorkerProcess], owner: int) -> None:
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
        self._spec, self.sandbox = spec.confined(allow_weak=allow_weak_sandbox, timeout=timeout)
        self._timeout, self._recycle_after, self._start_timeout = timeout, recycle_after, start_timeout
        self._lock = threading.Lock()
        self._attempts = (
            1  # at first a worker that does not start is an error; in a long run it gets more tries
        )
        self._failed_starts = 0
        self._workers: list[WorkerProcess] = []
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
                    worker.ask(self._timeout, *job.items[worker.item])
            job.settled.update(self._step())

    def _start(self) -> WorkerProcess:
        return WorkerProcess(self._spec, self._start_timeout, self._timeout)

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
        # Ending one worker takes time in which others may reply: all are held against the clock of one look.
        now = time.monotonic()
        for slot, worker in enumerate(self._workers):
            events = happened.get(worker, 0)
            if events & selectors.EVENT_WRITE:
                worker.flush()
            settled += self._attend(slot, bool(events & selectors.EVENT_READ), now)
        return settled

    def _attend(self, slot: int, readable: bool, now: float) -> list[tuple[int, Verdict]]:
        """Takes a worker's reply, and replaces the worker where that is due; returns what is settled by it."""
        worker = self._workers[slot]
        late = worker.deadline is not None and now >= worker.deadline
        # A reply that has come counts, even if the pool is late to look (stopped by SIGSTOP, the machine busy): the
        # selector may have returned without it, so the line is read once more before a worker is killed.
        there = worker.receive() if readable or late else True
        settled = []
        try:
            if reply := worker.reply():
                settled = self._settle(worker, *reply)
                late = False
        except BadReply as error:
            return self._replace(slot, f"the worker's reply is damaged or forged: {error}")
        if worker.idle and worker.suspect:
            _log.warning(
                "verifier %s replied more than once, or wrote to its worker's socket: the worker is replaced",
                self._spec.source,
            )
            self._replace(slot, "surplus replies")
        elif not there:
            settled += self._replace(slot, None)
        elif worker.idle and worker.judged >= self._recycle_after:
            worker.stop(wait=1.0)
            self._workers[slot] = self._start()
        elif late and not worker.reprieve(now):
            limit = self._timeout if worker.ready else self._start_timeout
            settled += self._replace(slot, f"wall-clock limit of {limit:g} s")
        return settled

    def _settle(self, worker: WorkerProcess, content: Verdict | str | None) -> list[tuple[int, Verdict]]:
        if isinstance(content, str) and not worker.ready:
            raise UserError(content)
        if isinstance(content, Verdict) != worker.ready:
            raise BadReply("a reply to another request")
        if content is None:
            if worker.suspect:
                raise BadReply("more than the reply that it has started")
            worker.ready, self._failed_starts = True, 0
            return []
        item, worker.item = worker.item, None
        worker.judged += 1
        return [(item, content)]

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
