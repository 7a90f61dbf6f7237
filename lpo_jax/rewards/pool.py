"""A pool of worker processes that run a verifier.

The parent process enforces the wall-clock limit: a worker that exceeds it on one item is killed together with all the
processes that it started, and is replaced; the item's verdict is `infrastructure`. Workers are started with `python
-c`. They are not forked, because a fork of a process that runs JAX may deadlock, and not started by `multiprocessing`,
which would run the user's main script again.
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

from lpo_jax.errors import UserError
from lpo_jax.rewards.registry import VerifierSpec
from lpo_jax.rewards.verdict import Verdict, infrastructure
from lpo_jax.rewards.worker_process import BadReply, WorkerProcess
from lpo_jax.types import Json

_START_ATTEMPTS = 3

_log = logging.getLogger(__name__)


def _stop_all(workers: list[WorkerProcess], owner: int) -> None:
    if os.getpid() != owner:
        return  # this is a forked copy of the trainer; the workers belong to the original
    for worker in workers:
        worker.socket.close()  # all workers exit at the same time, and are then reaped one by one
    while workers:
        worker = workers.pop()
        worker.stop(wait=1.0 if worker.idle else 0.0)


class Judging:
    """Responses that are judged while more are submitted; created by `VerifierPool.judging`."""

    def __init__(self):
        self.items: list[tuple[str, Mapping[str, Json]]] = []
        self.settled: dict[int, Verdict] = {}
        self.complete = False  # True once no more responses will be submitted
        self.error: BaseException | None = None
        self.wake_reader, self.wake_writer = socket.socketpair()  # wakes the thread that waits for workers
        for end in (self.wake_reader, self.wake_writer):
            end.setblocking(False)

    def submit(self, response: str, example: Mapping[str, Json]) -> None:
        """Submit one response (without prompt and prefill) to the data row `example`. Returns immediately."""
        self.items.append((response, example))
        self.wake()

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts in the order of submission; available after the `with` block has ended."""
        return [self.settled[item] for item in range(len(self.items))]

    def wake(self) -> None:
        """Wake the thread that waits for workers."""
        with contextlib.suppress(BlockingIOError):  # enough wake-ups are pending
            self.wake_writer.send(b"!")


class VerifierPool:
    """Runs one verifier in worker processes, with a wall-clock limit for each item.

    Use it as a context manager, or call `close`; interpreter exit also closes it. An exception inside `verify` or
    `judging` (such as Ctrl-C) closes it immediately. It may be used from several threads; their calls run one at a
    time.

    Args:
      verifier: a `VerifierSpec`, or only its source.
      workers: the constant number of processes; by default one per core, at most 8.
      timeout: wall-clock limit for one item, in seconds.
      recycle_after: number of items after which a worker is replaced, so that memory leaks stay bounded.
      start_timeout: wall-clock limit for a worker to import the verifier, in seconds.
      allow_weak_sandbox: whether the code verifier may run programs in a sandbox in which they can read this user's
        files; see `sandbox.py`. Other verifiers run no programs.

    Attributes:
      sandbox: the kind of sandbox that programs run in; empty for a verifier that runs none.

    Raises:
      UserError: if an argument is invalid, the verifier cannot be loaded, or programs cannot be confined. All of this
        is checked before the constructor returns.
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
        self._attempts = 1  # the first start must succeed; later in a run, starts are retried
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
        """End all workers and wait for them. Further calls do nothing."""
        self._close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers, for logs and tests."""
        return [worker.process.pid for worker in self._workers]

    def verify(self, responses: Sequence[str], examples: Sequence[Mapping[str, Json]]) -> list[Verdict]:
        """Judge responses in parallel.

        Args:
          responses: the texts, without prompt and prefill.
          examples: the data row of each response.

        Returns:
          The verdicts in the order of the responses, the same for any number of workers. If the verifier raised, hung,
          died or returned no finite number, the verdict is `infrastructure` and `masked`.

        Raises:
          ValueError: if the lengths differ.
          RuntimeError: if the pool is closed.
          UserError: if replacement workers repeatedly fail to start.
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
        """Judge responses while the body of the `with` statement submits them; leaving it waits for the rest.

        The verdicts and guarantees are those of `verify`.

        Raises:
          RuntimeError: if the pool is closed.
          UserError: if replacement workers repeatedly fail to start.
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
                thread.join()  # also after an error: no other thread may use the workers once they are closed
            if job.error:
                raise job.error

    @contextlib.contextmanager
    def _alone(self, job: Judging) -> Iterator[None]:
        with self._lock, job.wake_reader, job.wake_writer:
            if not self._close.alive:
                raise RuntimeError("the verifier pool is closed")
            self._job = job
            try:
                yield
            except BaseException:
                self.close()  # otherwise pending replies would be taken for those of the next call
                raise
            finally:
                self._job = None

    def _judge_apart(self, job: Judging) -> None:
        try:
            self._judge(job)
        except BaseException as error:
            job.error = job.error or error

    def _judge(self, job: Judging) -> None:
        """Judge items until all that were submitted have a verdict and no more will come."""
        started = 0
        if job.items or not job.complete:
            self._step(wait=0)  # replaces workers that died since the last call
        while not job.error and not (job.complete and len(job.settled) == len(job.items)):
            for worker in self._workers:
                if worker.idle and started < len(job.items):
                    worker.item, started = started, started + 1
                    worker.request(self._timeout, *job.items[worker.item])
            job.settled.update(self._step())

    def _start(self) -> WorkerProcess:
        return WorkerProcess(self._spec, self._start_timeout, self._timeout)

    def _step(self, wait: float | None = None) -> list[tuple[int, Verdict]]:
        """Wait until a worker replies, dies or exceeds its limit, and handle it.

        Args:
          wait: longest wait in seconds; None: until the next deadline or wake-up.

        Returns:
          The items judged, as pairs of index and verdict.
        """
        if wait is None:
            deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
            wait = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        settled = []
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
                selector.register(worker.socket, events, worker)
            if self._job:
                selector.register(self._job.wake_reader, selectors.EVENT_READ)
            happened = {key.data: events for key, events in selector.select(wait)}
        if None in happened:
            self._job.wake_reader.recv(1 << 16)
        # Ending one worker takes time, in which others may reply: all deadlines are compared with one reading of the
        # clock.
        now = time.monotonic()
        for slot, worker in enumerate(self._workers):
            events = happened.get(worker, 0)
            if events & selectors.EVENT_WRITE:
                worker.flush()
            settled += self._attend(slot, bool(events & selectors.EVENT_READ), now)
        return settled

    def _attend(self, slot: int, readable: bool, now: float) -> list[tuple[int, Verdict]]:
        """Take a worker's reply and replace the worker if necessary; return the items that this settles."""
        worker = self._workers[slot]
        late = worker.deadline is not None and now >= worker.deadline
        # A reply that has arrived counts, even if the pool reads it late (stopped by SIGSTOP, or the machine is busy).
        # The selector may have returned without it, so the socket is read once more before a worker is killed.
        connected = worker.receive() if readable or late else True
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
        elif not connected:
            settled += self._replace(slot, None)
        elif worker.idle and worker.judged >= self._recycle_after:
            worker.stop(wait=1.0)
            self._workers[slot] = self._start()
        elif late and not worker.extend_deadline(now):
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
        return [(item, content)]  # type: ignore[list-item]

    def _replace(self, slot: int, reason: str | None) -> list[tuple[int, Verdict]]:
        """Replace a worker that hangs or died; return the items that this settles.

        Args:
          slot: the worker's index.
          reason: why the worker is replaced; None if it died.
        """
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
