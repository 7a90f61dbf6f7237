"""What the processes of a job know of one another: that each is there, what it is doing, and why it ended.

Each process writes a line about itself into the store of jax's coordination service every `BEAT` seconds and reads the
others'. A process that ends with an error leaves its reason there, and the others end at once with that reason. One
that was killed leaves nothing: after `SILENCE` seconds the others say which it is and what it was doing, a few seconds
before jax's runtime ends them with a message that says neither. Where the first process was killed the store is gone
with it, and the runtime's message is all there is.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

BEAT = 1.0
SILENCE = 10.0  # less than `hosts.HEARTBEAT`, at which the runtime ends the process
FOLDER = "lpo/presence"


class Presence:
    """Of one process. `phase` is what it is doing, for the others' messages.

    Args:
      store: jax's distributed client, or what has its `key_value_set` and `key_value_dir_get`.
      index, count: of this process, and how many there are.
      end: called where another process has ended with an error; ends this one.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        store: Any,
        index: int,
        count: int,
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.phase = "starting"
        self._store, self._index, self._count, self._end, self._clock = store, index, count, end, clock
        self._beats = 0
        self._heard: dict[int, tuple[dict, float]] = {}  # process -> its last line, and when it changed
        self._silent: set[int] = set()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Writes and reads in a thread of its own until `leave`."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def leave(self, reason: str | None = None) -> None:
        """The last line of this process: it has done its part, or it ends with an error for this reason."""
        self._stopped.set()
        with contextlib.suppress(Exception):  # the service may be gone, which the runtime reports
            self._write(ended="with an error" if reason else "well", reason=reason)
        if reason:
            time.sleep(
                3 * BEAT
            )  # the store ends with the first process; the others read the reason until then

    def beat(self) -> None:
        """Writes a line, and reads the others'."""
        self._beats += 1
        self._write()
        now = self._clock()
        for key, text in self._store.key_value_dir_get(FOLDER):
            other, line = int(key.rpartition("/")[2]), json.loads(text)
            if other != self._index:
                self._hear(other, line, now)

    def _hear(self, other: int, line: dict, now: float) -> None:
        before, since = self._heard.get(other, (None, now))
        if line != before:
            self._heard[other] = line, now
            since = now
        name = f"process {other} of {self._count}"
        if line.get("ended") == "with an error":
            _say(f"{name} ended while it was {line['phase']}: {line['reason']}; so this one ends too")
            self._end(1)
        elif not line.get("ended") and now - since > SILENCE and other not in self._silent:
            self._silent.add(other)
            _say(
                f"{name} has given no sign of life for {SILENCE:.0f} s and was {line['phase']} when last heard of; if "
                "it was killed, this one ends in a moment: start all of them again with --resume"
            )

    def _write(self, **more: Any) -> None:
        line = {"beat": self._beats, "phase": self.phase, **more}
        self._store.key_value_set(f"{FOLDER}/{self._index}", json.dumps(line), allow_overwrite=True)

    def _run(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                self.beat()
            except Exception:  # of the service, which is ending: the runtime ends this process too
                return


def _say(line: str) -> None:
    print(f"lpo: {line}", file=sys.stderr, flush=True)
