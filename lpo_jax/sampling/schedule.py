"""Which rows are on the device when: the host's side of sampling.

Between two calls of `decode` the host takes out rows that have ended, puts waiting ones in their places, moves
the last stragglers into a smaller batch, and keeps own storage as long as the longest row on the device needs.
None of it changes a row: its tokens depend on its prompt and its own random key alone.

Where all rows fit at once they lie prompt by prompt, and nothing has to say who shares a prompt. Where they do not,
or once they have moved, two small maps say it (`Rows.members`, `Rows.places`).

Axes: P prompts · K responses · R places on the device · U prompts in storage · T tokens of own storage.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lpo_jax.models import sharding
from lpo_jax.models.attention import Attention
from lpo_jax.sampling import decode as device
from lpo_jax.sampling.decode import CHUNK, Rows
from lpo_jax.scale import hosts

FIRST_STORAGE = 64  # tokens that own storage starts with; it doubles as rows grow
FEWEST_ROWS = 8  # a smaller batch takes as long: reading the weights is all there is to it
IDLE = 16  # one in so many places may be empty before the device stops for waiting rows to come in
EMPTY = -1


class Schedule:
    """One call of the sampler: P K rows, of which at most `max_rows` are on the device at once.

    Inside, rows are numbered p K + k.

    Args:
      programs: the static arguments of `decode`: config, eos_ids, sampling, dtype.
      prompts: `[P, S]`; lengths: `[P]`; keys: `[P, K, 2]` uint32; budgets: `[P, K]` tokens at most, 0: not sampled.
      max_rows: 0: no limit. On a mesh whose devices share the prompts all rows run at once, whatever it is, and
        none is moved: that would be from device to device.
      completes: the length at which a row's ids first hold a stop string, None: they do not.
      on_end: called with a row's p, k and ids once it has ended, while the device goes on with others.
      attention: as `lpo_jax.models.attention` understands it.
    """

    def __init__(
        self,
        programs: tuple[Any, ...],
        weights: Any,
        prompts: np.ndarray,
        lengths: np.ndarray,
        keys: np.ndarray,
        budgets: np.ndarray,
        max_tokens: int,
        max_rows: int,
        completes: Callable[[Sequence[int], int], int | None] | None,
        on_end: Callable[[int, int, list[int]], None] | None,
        attention: Attention,
    ):
        self.config, self.eos_ids, _, self.dtype = self.programs = programs
        self.weights, self.prompts, self.prompt_lengths = weights, prompts, lengths
        self.keys, self.budgets = keys.reshape(-1, 2), budgets.reshape(-1).astype(np.int32)
        self.completes, self.on_end, self.attention = completes, on_end, attention
        P, self.K = budgets.shape
        rows = P * self.K
        self.tokens = np.zeros((rows, max_tokens), np.int32)
        self.log_probs = np.zeros((rows, max_tokens), np.float32)
        self.lengths = np.zeros(rows, np.int32)
        self.finished = np.zeros(rows, bool)
        self.row_steps = np.zeros(rows, np.float32)
        self.going = self.budgets > 0

        self.sharded = sharding.batch_shards() > 1
        self.side_by_side = self.sharded or not 0 < max_rows < rows
        # Prompts that wait to be put in place, and where: storage and index in it.
        self.prefilled: dict[int, tuple[device.Storage, int]] = {}
        if self.side_by_side:
            R, self.limit = rows, max_tokens
            self.waiting: collections.deque[int] = collections.deque()
            self.row_of, self.prompt_of = np.arange(rows), np.arange(P)
            self.prompt_kv = device.prefill(self.config, self.dtype, weights, prompts, lengths, attention)
        else:
            # Rows that come at different times lie behind each other's beginnings: room for a quarter more, so
            # that dropping what nobody needs is rare.
            R, self.limit = max_rows, max_tokens + max(CHUNK, max_tokens // 4)
            self.waiting = collections.deque(np.flatnonzero(self.going).tolist())
            self.batch = max(1, R // self.K)  # prompts that fill the device, and that are prefilled at once
            self.row_of, self.prompt_of = np.full(R, EMPTY), np.full(min(P, 4 * self.batch), EMPTY)
            shape = (len(self.prompt_of), prompts.shape[1])
            self.prompt_kv = device.empty_storage(self.config, shape, self.dtype)
        self.at, self.storage = 0, min(FIRST_STORAGE, self.limit)
        self.own_kv = device.empty_storage(self.config, (R, self.storage), self.dtype)
        self.widest = self.K  # C

    def run(self) -> list[np.ndarray]:
        """Samples all rows to their end. Returns the fields of `Responses`."""
        ended: list[int] = []
        while True:
            self._admit()
            if not len(self._live()):
                break
            self._shrink()
            self._make_room()
            drawn = self._decode()
            self._report(ended)
            ended = self._account(drawn)
        self._report(ended)
        fields = (self.tokens, self.log_probs, self.lengths, self.finished, self.row_steps)
        return [x.reshape(-1, self.K, *x.shape[1:]) for x in fields]

    def _live(self) -> np.ndarray:
        """The places of rows that go on."""
        return np.flatnonzero((self.row_of != EMPTY) & self.going[self.row_of])

    def _admit(self) -> None:
        """Waiting rows into the places of those that have ended, as long as their prompts find a place too."""
        free = collections.deque(sorted(set(range(len(self.row_of))) - set(self._live().tolist())))
        while self.waiting and free:
            p = self.waiting[0] // self.K
            if p not in self.prompt_of:
                needed = set((self.row_of[self._live()] // self.K).tolist())
                places = [u for u, there in enumerate(self.prompt_of) if there not in needed]
                if not places:
                    break
                self._bring(p, places[0])
            self.row_of[free.popleft()] = self.waiting.popleft()

    def _bring(self, p: int, place: int) -> None:
        if p not in self.prefilled:
            coming = list(dict.fromkeys(row // self.K for row in self.waiting))[: self.batch]
            padded = np.array(coming + [coming[0]] * (self.batch - len(coming)))
            batch = self.prompts[padded], self.prompt_lengths[padded]
            kept = device.prefill(self.config, self.dtype, self.weights, *batch, self.attention)
            self.prefilled = {q: (kept, i) for i, q in enumerate(coming)}
        self.prompt_kv = device.put_prompt(self.prompt_kv, *self.prefilled.pop(p), place)
        self.prompt_of[place] = p

    def _shrink(self) -> None:
        """Moves the last rows into half the places or fewer, and their prompts with them."""
        live = self._live()
        if self.sharded or self.waiting or len(live) > self._half() or self._left() <= CHUNK:
            return
        R = max(FEWEST_ROWS, _power_of_two(len(live)))
        rows = self.row_of[live]
        self.own_kv = device.move(self.own_kv, _padded(live, R), np.int32(0), self.storage)
        self.row_of = _padded(rows, R, EMPTY)
        needed, counts = np.unique(rows // self.K, return_counts=True)
        U = _power_of_two(len(needed))
        if U < len(self.prompt_of):
            where = np.array([np.flatnonzero(self.prompt_of == p)[0] for p in needed])
            S = self.prompts.shape[1]
            self.prompt_kv = device.move(self.prompt_kv, _padded(where, U), np.int32(0), S)
            self.prompt_of = _padded(needed, U, EMPTY)
        self.widest = min(self.K, _power_of_two(counts.max()))
        self.side_by_side = False

    def _make_room(self) -> None:
        """Own storage for the next tokens: what lies before the longest row is dropped, then the rest doubled."""
        if self.at + min(CHUNK, self._left()) <= self.storage:
            return
        longest = int(self.lengths[self.row_of[self._live()]].max())
        storage = self.storage
        while storage < self.limit and longest + max(CHUNK, storage // 4) > storage:
            storage = min(2 * storage, self.limit)
        self.own_kv = device.move(self.own_kv, None, np.int32(self.at - longest), storage)
        self.at, self.storage = longest, storage

    def _left(self) -> int:
        """Tokens that the row with most to go may still draw."""
        rows = self.row_of[self._live()]
        return int((self.budgets - self.lengths)[rows].max())

    def _decode(self) -> device.Drawn:
        live = self._live()
        going = np.zeros(len(self.row_of), bool)
        going[live] = True
        prompts = np.maximum(self.row_of, 0) // self.K
        members = places = None
        if not self.side_by_side:
            members, places = self._maps(live)
        rows = Rows(
            token=np.where(
                self.lengths[self.row_of] > 0,
                self.tokens[self.row_of, self.lengths[self.row_of] - 1],
                self.prompts[prompts, self.prompt_lengths[prompts] - 1],
            ),
            start=self.prompt_lengths[prompts] - 1,
            drawn=self.lengths[self.row_of],
            budget=self.budgets[self.row_of],
            going=going,
            keys=self.keys[self.row_of],
            members=members,
            places=places,
        )
        stored = self.prompt_lengths[np.maximum(self.prompt_of, 0)]
        limit = min(CHUNK, self.storage - self.at, self._left())
        drawn, self.own_kv = device.decode(
            *self.programs,
            self.weights,
            rows,
            stored,
            self.prompt_kv,
            self.own_kv,
            np.int32(self.at),
            np.int32(limit),
            np.int32(self._fewest()),
            self.attention,
        )
        return drawn

    def _fewest(self) -> int:
        """How many rows must go on for the device to do so: else others come in, or those that are left move."""
        R = len(self.row_of)
        if self.waiting:
            enough = R - R // IDLE
        elif self.sharded or len(self._live()) <= self._half():
            enough = 1
        else:
            enough = self._half() + 1
        return min(enough, len(self._live()))

    def _half(self) -> int:
        """The next smaller number of places; 0: there is none."""
        half = _power_of_two(len(self.row_of) // 2 + 1) // 2
        return half if half >= FEWEST_ROWS else 0

    def _maps(self, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`members [U, C]` and `places [R]`."""
        members = np.zeros((len(self.prompt_of), self.widest), np.int32)
        places = np.zeros(len(self.row_of), np.int32)
        place_of = {p: u for u, p in enumerate(self.prompt_of.tolist())}
        taken = collections.Counter()
        for slot in live.tolist():
            u = place_of[self.row_of[slot] // self.K]
            members[u, taken[u]] = slot
            places[slot] = u * self.widest + taken[u]
            taken[u] += 1
        return members, places

    def _account(self, drawn: device.Drawn) -> list[int]:
        """Writes down what was drawn. Returns the rows that have ended by it."""
        live = self._live()
        drawn = hosts.to_host(drawn)
        self.at += int(drawn.steps)
        rows = self.row_of[live]
        self.row_steps[rows] += int(drawn.steps) * len(self.row_of) / len(live)
        for slot, row in zip(live.tolist(), rows.tolist()):
            before, now = self.lengths[row], drawn.drawn[slot]
            self.tokens[row, before:now] = drawn.tokens[slot, : now - before]
            self.log_probs[row, before:now] = drawn.log_probs[slot, : now - before]
            self.lengths[row], self.going[row] = now, drawn.going[slot]
            self.finished[row] = self.tokens[row, now - 1] in self.eos_ids
            if self.completes:
                self._stop(row)
        return rows[~self.going[rows]].tolist()

    def _stop(self, row: int) -> None:
        """Ends a row whose text holds a stop string behind the token that completed it."""
        end = self.completes(self.tokens[row, : self.lengths[row]].tolist(), CHUNK)
        if end is not None:
            self.tokens[row, end:], self.log_probs[row, end:] = 0, 0.0
            self.lengths[row], self.going[row], self.finished[row] = end, False, True

    def _report(self, ended: Iterable[int]) -> None:
        if self.on_end:
            for row in ended:
                self.on_end(*divmod(row, self.K), self.tokens[row, : self.lengths[row]].tolist())


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (int(n) - 1).bit_length()


def _padded(x: np.ndarray, size: int, value: int = 0) -> np.ndarray:
    return np.pad(x, (0, size - len(x)), constant_values=value)


def completes(
    decode: Callable[[list[int]], str], stop: Sequence[str], ids: list[int], new: int
) -> int | None:
    """The fewest tokens whose text holds a stop string, None if all of them do not.

    Args:
      new: only the last so many tokens, and a token that they complete, can hold the first one.
    """
    holds = lambda n: any(s in decode(ids[:n]) for s in stop)  # noqa: E731
    if not holds(len(ids)):
        return None
    n = max(1, len(ids) - 2 * new)
    while not holds(n):
        n += 1
    while n > 1 and holds(n - 1):
        n -= 1
    return n


def stopper(decode, stop: Sequence[str]):
    """`completes` for one sampler and its stop strings; None where there are none."""
    return functools.partial(completes, decode, stop) if stop else None
