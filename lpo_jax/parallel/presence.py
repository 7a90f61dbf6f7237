"""Heartbeats between the processes of a job: whether each is alive, what it is doing, and why it ended.

Every `BEAT` seconds each process writes a status to the key-value store of JAX's coordination service and reads the
others' statuses. A process that ends with an error writes the reason, and the others report it and end at once; it
waits a few seconds until they have. A process that was killed writes nothing. After `SILENCE` seconds the others
report its index and last phase, a few seconds before the JAX runtime ends them with a message that contains neither.
If the first process was killed, the store is lost too, and only the runtime's message remains.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from lpo_jax.types import Json

BEAT = 1.0
SILENCE = 10.0  # less than `hosts.HEARTBEAT`, after which the runtime ends the process
WAIT = 10  # the most heartbeats for which a process that ends with an error waits for the others
FOLDER = "lpo/presence"


class Store(Protocol):
    """The methods of JAX's distributed client that are used here."""

    def key_value_set(self, key: str, value: str, *, allow_overwrite: bool) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


class Presence:
    """The heartbeat of one process. Set `phase` to what the process is doing; the others report it.

    Args:
      store: JAX's distributed client.
      index: the index of this process.
      count: the number of processes.
      end: ends this process with an exit status; called when another process has ended with an error.
      clock: returns seconds; tests replace it.
    """

    def __init__(
        self,
        store: Store,
        index: int,
        count: int,
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.phase = "starting"
        self._store, self._index, self._count, self._end, self._clock = store, index, count, end, clock
        self._beats = 0
        # Process -> its last status, and when it changed.
        self._last: dict[int, tuple[dict[str, Json], float]] = {}
        self._silent: set[int] = set()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start a daemon thread that calls `beat` every `BEAT` seconds until `leave`."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def leave(self, reason: str | None = None) -> None:
        """Write the last status of this process: it has finished, or it ends with an error for this reason."""
        self._stopped.set()
        with contextlib.suppress(Exception):  # the service may be gone; the runtime reports that
            self._write(ended="with an error" if reason else "well", reason=reason)
        if reason:
            # The store ends with the first process; wait until the others have read the reason.
            with contextlib.suppress(Exception):
                for _ in range(WAIT):
                    time.sleep(BEAT)
                    if self._all_ended():
                        break

    def beat(self) -> None:
        """Write this process's status and read the others'."""
        self._beats += 1
        self._write()
        now = self._clock()
        for key, text in self._store.key_value_dir_get(FOLDER):
            other, status = int(key.rpartition("/")[2]), json.loads(text)
            if other != self._index:
                self._check(other, status, now)

    def _check(self, other: int, status: dict[str, Json], now: float) -> None:
        """Compare a status with the previous one of that process; report its end or its silence."""
        before, since = self._last.get(other, (None, now))
        if status != before:
            self._last[other] = status, now
            since = now
        name = f"process {other} of {self._count}"
        if status.get("ended") == "with an error":
            _report(f"{name} ended while it was {status['phase']}: {status['reason']}; so this one ends too")
            self._write(ended="with another")
            self._end(1)
        elif not status.get("ended") and now - since > SILENCE and other not in self._silent:
            self._silent.add(other)
            _report(
                f"{name} has sent no heartbeat for {SILENCE:.0f} s and was {status['phase']} in its last one; if "
                "it was killed, this one ends in a moment: start all of them again with --resume"
            )

    def _all_ended(self) -> bool:
        statuses = [json.loads(text) for _, text in self._store.key_value_dir_get(FOLDER)]
        return len(statuses) == self._count and all(status.get("ended") for status in statuses)

    def _write(self, **more: str | None) -> None:
        status = {"beat": self._beats, "phase": self.phase, **more}
        self._store.key_value_set(f"{FOLDER}/{self._index}", json.dumps(status), allow_overwrite=True)

    def _run(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                self.beat()
            except Exception:  # the service is ending, and the runtime ends this process too
                return


def _report(line: str) -> None:
    print(f"lpo: {line}", file=sys.stderr, flush=True)
