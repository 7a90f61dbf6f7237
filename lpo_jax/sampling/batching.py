"""Which rows are on the device when: the host's side of sampling.

Between two calls of `decode` the host takes out rows that have ended and puts waiting ones in their places. Where
attention is plain products it also moves the last stragglers into a smaller batch, and keeps own storage as long as the
longest row on the device needs. None of it changes a row: its tokens depend on its prompt and its own random key alone.

Where all rows fit at once they lie prompt by prompt, and nothing has to say who shares a prompt. Where they do not,
or once they have moved, two small maps say it (`Rows.members`, `Rows.places`).

On a mesh whose devices share the prompts, each shard has its own prompts with all their rows, its own places and its
own queue, and nothing moves from one to another. One device is one shard.

Axes: P prompts · K responses · R places on the device · U prompts in storage · T tokens of own storage. All three of
rows, places and prompts in storage lie shard by shard.
"""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lpo_jax.models.attention import Attention, uses_kernels
from lpo_jax.parallel import hosts, sharding
from lpo_jax.sampling import decode as device
from lpo_jax.sampling import kv_cache
from lpo_jax.sampling.decode import Rows
from lpo_jax.sampling.kv_cache import CHUNK, Room
from lpo_jax.sampling.request import PromptBatch

FEWEST_ROWS = 8  # a smaller batch takes as long: reading the weights is all there is to it
IDLE = 16  # one in so many places may be empty before the device stops for waiting rows to come in
EMPTY = -1


class Schedule:
    """One call of the sampler: P K rows, of which at most `max_rows` are on the device at once.

    Inside, rows are numbered p K + k.

    Args:
      programs: the static arguments of `decode`: config, eos_ids, sampling, dtype.
      prompts: P of them, a multiple of the shards.
      keys: `[P, K, 2]` uint32; budgets: `[P, K]` tokens at most, 0: not sampled.
      max_rows: on all shards together, at least one on each; 0: no limit.
      completes: the length at which a row's ids first hold a stop string, None: they do not.
      on_finished: called with a row's p, k and ids once it has ended, while the device goes on with others.
      attention: as `lpo_jax.models.attention` understands it.
    """

    def __init__(
        self,
        programs: tuple[Any, ...],
        weights: Any,
        prompts: PromptBatch,
        keys: np.ndarray,
        budgets: np.ndarray,
        max_tokens: int,
        max_rows: int,
        completes: Callable[[Sequence[int], int], int | None] | None,
        on_finished: Callable[[int, int, list[int]], None] | None,
        attention: Attention,
    ):
        self.config, self.eos_ids, _, self.dtype = self.programs = programs
        self.weights, self.prompts, self.prompt_lengths = weights, prompts.tokens, prompts.lengths
        self.keys, self.budgets = keys.reshape(-1, 2), budgets.reshape(-1).astype(np.int32)
        self.completes, self.on_finished, self.attention = completes, on_finished, attention
        P, self.K = budgets.shape
        rows = P * self.K
        self.tokens = np.zeros((rows, max_tokens), np.int32)
        self.log_probs = np.zeros((rows, max_tokens), np.float32)
        self.lengths = np.zeros(rows, np.int32)
        self.finished = np.zeros(rows, bool)
        self.row_steps = np.zeros(rows, np.float32)
        self.going = self.budgets > 0

        self.shards = sharding.batch_shards()
        self.room = Room.of(P, self.K, max_tokens, max_rows, self.shards)
        self.side_by_side = not self.room.waits
        # Prompts that wait to be put in place, and where among them each is, by its shard's indices.
        self.kept: kv_cache.Storage | None = None
        self.prefilled: dict[int, int] = {}
        self.waiting: list[collections.deque[int]] = [collections.deque() for _ in range(self.shards)]
        if self.side_by_side:
            self.row_of, self.prompt_of = np.arange(rows), np.arange(P)
            arrays = self.prompts, self.prompt_lengths
            self.prompt_kv = kv_cache.prefill(self.config, self.dtype, weights, *arrays, attention)
        else:
            for row in np.flatnonzero(self.going).tolist():
                self.waiting[row * self.shards // rows].append(row)
            self.row_of, self.prompt_of = np.full(self.room.rows, EMPTY), np.full(self.room.prompts, EMPTY)
            shape = (self.room.prompts, self.prompts.shape[1])
            self.prompt_kv = kv_cache.empty_storage(self.config, shape, self.dtype)
        # Kernels read what a row has and no more, so one size, and one program to compile, does for all lengths.
        self.fixed = uses_kernels(attention)
        self.at, self.storage = (
            0,
            self.room.tokens if self.fixed else min(kv_cache.FIRST_STORAGE, self.room.tokens),
        )
        self.own_kv = kv_cache.empty_storage(self.config, (self.room.rows, self.storage), self.dtype)
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

    def _going(self) -> np.ndarray:
        """`[R]` bool: which places hold rows that go on."""
        return (self.row_of != EMPTY) & self.going[self.row_of]

    def _live(self) -> np.ndarray:
        """Their indices."""
        return np.flatnonzero(self._going())

    def _by_shard(self, x: np.ndarray) -> np.ndarray:
        """`[shards, ...]` a view of places, or of what stands in them."""
        return x.reshape(self.shards, -1)

    def _admit(self) -> None:
        """Waiting rows into the places of those that have ended, as long as their prompts find a place too."""
        while any(self.waiting) and (coming := self._seat()):
            self._bring(coming)

    def _seat(self) -> dict[int, tuple[int, int]]:
        """Gives rows places until a prompt is missing.

        Returns:
          The shards that need another prompt, with that prompt and its place in the shard's storage.
        """
        coming = {}
        places = zip(self.waiting, *map(self._by_shard, (self.row_of, self._going(), self.prompt_of)))
        for shard, (waiting, row_of, going, prompts) in enumerate(places):
            for place in np.flatnonzero(~going):
                if not waiting:
                    break
                if waiting[0] // self.K not in prompts:
                    unneeded = ~np.isin(prompts, row_of[going] // self.K)
                    if unneeded.any():
                        coming[shard] = waiting[0] // self.K, int(unneeded.argmax())
                    break
                row_of[place], going[place] = waiting.popleft(), True
        return coming

    def _bring(self, coming: dict[int, tuple[int, int]]) -> None:
        """One prompt for each of some shards."""
        if any(p not in self.prefilled for p, _ in coming.values()):
            self._prefill()
        source = np.zeros(self.shards, np.int32)
        place = np.full(self.shards, self.room.prompts, np.int32)  # past the end: none
        for shard, (p, u) in coming.items():
            source[shard], place[shard] = self.prefilled.pop(p), u
            self._by_shard(self.prompt_of)[shard, u] = p
        self.prompt_kv = kv_cache.put_prompts(self.prompt_kv, self.kept, source, place)

    def _prefill(self) -> None:
        """The next prompts of every shard, anew where one has some left: they run together and take as long as one."""
        batch = self._by_shard(np.zeros(self.room.batch, np.int32))
        self.prefilled = {}
        for row, waiting in zip(batch, self.waiting):
            missing = dict.fromkeys(p for p in (row // self.K for row in waiting) if p not in self.prompt_of)
            coming = list(missing)[: len(row)]
            row[: len(coming)] = coming
            self.prefilled |= {p: i for i, p in enumerate(coming)}
        self.kept = None  # never two of them
        arrays = self.prompts[batch.ravel()], self.prompt_lengths[batch.ravel()]
        self.kept = kv_cache.prefill(self.config, self.dtype, self.weights, *arrays, self.attention)

    def _shrink(self) -> None:
        """Moves the last rows into half the places or fewer, and their prompts with them."""
        live = self._by_shard(self._going())
        most = live.sum(1).max()
        if self.fixed or any(self.waiting) or most > self._half() or self._left() <= CHUNK:
            return
        R = max(FEWEST_ROWS, _power_of_two(most))
        places = [np.flatnonzero(going) for going in live]
        rows = [row_of[at] for row_of, at in zip(self._by_shard(self.row_of), places)]
        index = np.concatenate([_padded(at, R) for at in places])
        self.own_kv = kv_cache.move(self.own_kv, index, np.int32(0), self.storage)
        self.row_of = np.concatenate([_padded(x, R, EMPTY) for x in rows])
        needed = [np.unique(x // self.K) for x in rows]
        U = _power_of_two(max(map(len, needed)))
        if U * self.shards < len(self.prompt_of):
            there = self._by_shard(self.prompt_of)
            where = [np.flatnonzero(np.isin(prompts, p)) for prompts, p in zip(there, needed)]
            index = np.concatenate([_padded(at, U) for at in where])
            self.prompt_kv = kv_cache.move(self.prompt_kv, index, np.int32(0), self.prompts.shape[1])
            self.prompt_of = np.concatenate([_padded(x[at], U, EMPTY) for x, at in zip(there, where)])
        counts = np.bincount(np.concatenate(rows) // self.K)
        self.widest = min(self.K, _power_of_two(counts.max()))
        self.side_by_side = False

    def _make_room(self) -> None:
        """Own storage for the next tokens: what lies before the longest row is dropped, then the rest doubled."""
        if self.at + min(CHUNK, self._left()) <= self.storage:
            return
        longest = int(self.lengths[self.row_of[self._live()]].max())
        storage = self.storage
        while storage < self.room.tokens and longest + max(CHUNK, storage // 4) > storage:
            storage = min(2 * storage, self.room.tokens)
        self.own_kv = kv_cache.move(self.own_kv, None, np.int32(self.at - longest), storage)
        self.at, self.storage = longest, storage

    def _left(self) -> int:
        """Tokens that the row with most to go may still draw."""
        rows = self.row_of[self._live()]
        return int((self.budgets - self.lengths)[rows].max())

    def _decode(self) -> device.Drawn:
        live, going = self._live(), self._going()
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
        # Kernels read nothing of a prompt that nobody needs.
        needed = np.isin(self.prompt_of, self.row_of[live] // self.K)
        stored = np.where(needed, self.prompt_lengths[np.maximum(self.prompt_of, 0)], 1)
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
        live, half = len(self._live()), self._half() * self.shards
        if any(self.waiting):
            return max(live - len(self.row_of) // IDLE, 1)
        return half + 1 if live > half and not self.fixed else 1

    def _half(self) -> int:
        """The next smaller number of a shard's places; 0: there is none."""
        half = _power_of_two(len(self.row_of) // self.shards // 2 + 1) // 2
        return half if half >= FEWEST_ROWS else 0

    def _maps(self, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`members [U, C]` and `places [R]`, by each shard's own indices."""
        members = np.zeros((len(self.prompt_of), self.widest), np.int32)
        places = np.zeros(len(self.row_of), np.int32)
        place_of = {p: u for u, p in enumerate(self.prompt_of.tolist())}
        R, U = len(self.row_of) // self.shards, len(self.prompt_of) // self.shards
        taken = collections.Counter()
        for slot in live.tolist():
            u = place_of[self.row_of[slot] // self.K]
            members[u, taken[u]] = slot % R
            places[slot] = u % U * self.widest + taken[u]
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
        if self.on_finished:
            for row in ended:
                self.on_finished(*divmod(row, self.K), self.tokens[row, : self.lengths[row]].tolist())


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (int(n) - 1).bit_length()


def _padded(x: np.ndarray, size: int, value: int = 0) -> np.ndarray:
    return np.pad(x, (0, size - len(x)), constant_values=value)
