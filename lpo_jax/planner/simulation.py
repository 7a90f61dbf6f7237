"""Simulated continuous batching: which rows are on the device in each call of `decode`, for given response lengths.

`simulate_slots` follows `sampling.batching` with plain attention, whose cache has memory for the longest active row in
every slot. `simulate_pages` drives the admission of `sampling.pages`, as the batching with kernels does.

Axes: P prompts · K responses · R slots of a shard · U prompts in the cache of a shard.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from lpo_jax.sampling.batching import IDLE, LAST_SLOTS, MIN_SLOTS
from lpo_jax.sampling.calls import FEWEST
from lpo_jax.sampling.kv_cache import EMPTY, FIRST_TOKENS, Capacity
from lpo_jax.sampling.padding import next_power_of_two
from lpo_jax.sampling.pages import Admission, Pool


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of `decode`. Shards wait for one another, so the fullest one is counted.

    Attributes:
      steps: decode steps, in each of which a row draws a token.
      rows: active rows of all shards together.
      slots: slots of a shard, which the products of a step run over.
      tokens: response tokens that attention of a shard reads in a step.
      prompts: prompts that attention of a shard reads in a step.
    """

    steps: int
    rows: int
    slots: int
    tokens: float
    prompts: int


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The simulated sampling of a step.

    Attributes:
      calls: the calls of `decode`.
      prompts: prompts that a shard prefills, with padding.
      repeated: tokens that a shard prefills again, because their rows had been set aside.
    """

    calls: tuple[Call, ...]
    prompts: int
    repeated: int = 0

    @property
    def steps(self) -> int:
        """The number of decode steps."""
        return sum(call.steps for call in self.calls)

    def tokens_read(self, prompt_tokens: int) -> float:
        """Return the tokens whose keys and values attention of a shard reads in a step, mean over all steps."""
        read = sum(call.steps * (call.tokens + call.prompts * prompt_tokens) for call in self.calls)
        return read / self.steps

    @property
    def rows_at_once(self) -> float:
        """The mean number of active rows while the first half of the tokens is drawn, before the queue runs dry."""
        steps, rows = (np.array([getattr(call, name) for call in self.calls]) for name in ("steps", "rows"))
        drawn = steps * rows
        first = np.cumsum(drawn) - drawn < drawn.sum() / 2
        return float(drawn[first].sum() / steps[first].sum())


def simulate_slots(lengths: np.ndarray, capacity: Capacity, shards: int, call_tokens: int) -> Sampled:
    """Simulate the sampling of responses with plain attention.

    Args:
      lengths: `[P, K]` of the responses, P a multiple of `shards`; a row of length 0 is not sampled.
      capacity: sizes, over all shards together.
      shards: shards of the prompts, which wait for one another.
      call_tokens: the most tokens of a call.
    """
    return _Slots(lengths, capacity, shards, call_tokens).run()


class _Slots:
    def __init__(self, lengths: np.ndarray, capacity: Capacity, shards: int, call_tokens: int):
        self.call_tokens = call_tokens
        self.K, self.capacity, self.shards = lengths.shape[1], capacity, shards
        self.left = lengths.reshape(shards, -1).astype(int)  # [shards, rows] tokens that a row still draws
        self.drawn = np.zeros_like(self.left)
        self.row_of = np.full((shards, capacity.slots // shards), EMPTY)
        self.prompt_of = np.full((shards, capacity.prompts // shards), EMPTY)
        self.queues = [collections.deque(np.flatnonzero(left).tolist()) for left in self.left]
        self.prefilled: list[set[int]] = [set() for _ in range(shards)]
        self.prefills = 0
        self.slots, self.entries = self.row_of.shape[1], self.prompt_of.shape[1]
        self.index, self.tokens = 0, min(FIRST_TOKENS, capacity.tokens)
        if not capacity.queued:
            self.row_of[:], self.prompt_of[:] = np.arange(self.slots), np.arange(self.entries)
            self.queues, self.prefills = [collections.deque() for _ in range(shards)], 1

    def run(self) -> Sampled:
        calls = []
        while (self.left > 0).any():
            while any(self.queues) and (entries := self._fill()):
                self._insert(entries)
            self._resize()
            calls.append(self._decode())
        return Sampled(tuple(calls), self.prefills * self.capacity.prefill_batch // self.shards)

    def _active(self) -> np.ndarray:
        """`[shards, R]` bool."""
        return (self.row_of != EMPTY) & (np.take_along_axis(self.left, np.maximum(self.row_of, 0), 1) > 0)

    def _fill(self) -> dict[int, int]:
        """Fill free slots. Returns a free entry for each shard that lacks the prompt of its next row."""
        entries = {}
        for shard, active in enumerate(self._active()):
            queue, row_of, prompts = self.queues[shard], self.row_of[shard], self.prompt_of[shard]
            for slot in np.flatnonzero(~active):
                if not queue:
                    break
                if queue[0] // self.K not in prompts:
                    unused = ~np.isin(prompts, row_of[active] // self.K)
                    if unused.any():
                        entries[shard] = int(unused.argmax())
                    break
                row_of[slot], active[slot] = queue.popleft(), True
        return entries

    def _insert(self, entries: dict[int, int]) -> None:
        missing = {shard: self.queues[shard][0] // self.K for shard in entries}
        if any(prompt not in self.prefilled[shard] for shard, prompt in missing.items()):
            self.prefills += 1
            batch = self.capacity.prefill_batch // self.shards
            for shard, queue in enumerate(self.queues):
                coming = dict.fromkeys(row // self.K for row in queue)
                new = [prompt for prompt in coming if prompt not in self.prompt_of[shard]]
                self.prefilled[shard] = set(new[:batch])
        for shard, entry in entries.items():
            self.prompt_of[shard, entry] = missing[shard]
            self.prefilled[shard].discard(missing[shard])

    def _resize(self) -> None:
        """Shrink the batch to the last rows, and enlarge the cache."""
        most, left = int(self._active().sum(1).max()), int(self.left.max())
        if not any(self.queues) and most <= self._smaller():
            self.slots = max(self._fewest(), next_power_of_two(most))
            if not self._is_last_call():
                self.entries = min(self.entries, next_power_of_two(self._prompts()))
        if self.index + min(self.call_tokens, left) > self.tokens:
            self.index = int(self.drawn[self.left > 0].max())
            while (
                self.tokens < self.capacity.tokens
                and self.index + max(FEWEST, self.tokens // 4) > self.tokens
            ):
                self.tokens = min(2 * self.tokens, self.capacity.tokens)

    def _is_last_call(self) -> bool:
        return int(self.left.max()) <= self.call_tokens

    def _fewest(self) -> int:
        return LAST_SLOTS if self._is_last_call() else MIN_SLOTS

    def _smaller(self) -> int:
        half = next_power_of_two(self.slots // 2 + 1) // 2
        return half if half >= self._fewest() else 0

    def _prompts(self) -> int:
        """The number of prompts with active rows of the fullest shard."""
        return max(len(np.unique(row[on] // self.K)) for row, on in zip(self.row_of, self._active()))

    def _least(self, rows: int) -> int:
        """With fewer active rows than this, `decode` returns."""
        if any(self.queues):
            return max(rows - self.slots * self.shards // IDLE, 1)
        smaller = self._smaller() * self.shards
        return smaller + 1 if rows > smaller else 1

    def _decode(self) -> Call:
        active, index = self._active(), np.maximum(self.row_of, 0)
        left = np.where(active, np.take_along_axis(self.left, index, 1), 0)
        rows = int(active.sum())
        steps = _steps(left[active], self._least(rows), min(self.call_tokens, self.tokens - self.index))
        drawn = np.minimum(left, steps)
        for shard, on in enumerate(active):
            self.left[shard, self.row_of[shard, on]] -= drawn[shard, on]
            self.drawn[shard, self.row_of[shard, on]] += drawn[shard, on]
        self.index += steps
        return Call(steps, rows, self.slots, self.slots * self.tokens, self.entries)


def simulate_pages(
    lengths: np.ndarray, pool: Pool, prompt_tokens: int, shards: int, call_tokens: int
) -> Sampled:
    """Simulate the sampling of responses with a KV cache in pages.

    Args:
      lengths: `[P, K]` of the responses, P a multiple of `shards`; a row of length 0 is not sampled.
      pool: sizes of the cache of one shard.
      prompt_tokens: tokens of every prompt that the cache holds.
      shards: shards of the prompts, which wait for one another.
      call_tokens: the most tokens of a call.
    """
    K = lengths.shape[1]
    final = lengths.reshape(shards, -1).astype(int)
    drawn, repeated, prefilled = np.zeros_like(final), np.zeros(shards, int), np.zeros(shards, int)
    prompts = np.full(final.shape[1] // K, prompt_tokens)
    admissions = [Admission(pool, np.flatnonzero(of_shard).tolist(), K, prompts) for of_shard in final]
    calls = []
    while any(admission.active or admission.queue for admission in admissions):
        for shard, admission in enumerate(admissions):
            moves = admission.schedule(np.minimum(drawn[shard] + call_tokens, final[shard]))
            prefilled[shard] += len(moves.prompts)
            again = [row for row in moves.entered if drawn[shard, row]]
            repeated[shard] += (prompt_tokens + drawn[shard, again]).sum()
        rows = [np.array(admission.active, int) for admission in admissions]
        left = np.concatenate([final[shard, on] - drawn[shard, on] for shard, on in enumerate(rows)])
        queued = any(admission.queue for admission in admissions)
        steps = _steps(left, max(len(left) - pool.slots * shards // IDLE, 1) if queued else 1, call_tokens)
        tokens, used = 0.0, 0
        for shard, on in enumerate(rows):
            more = np.minimum(final[shard, on] - drawn[shard, on], steps)
            tokens = max(tokens, float((drawn[shard, on] + more / 2).sum()))
            used = max(used, len(np.unique(on // K)))
            drawn[shard, on] += more
            for row in on[drawn[shard, on] == final[shard, on]].tolist():
                admissions[shard].end(row)
        calls.append(Call(steps, len(left), pool.slots, tokens, used))
    return Sampled(tuple(calls), int(prefilled.max()), int(repeated.max()))


def _steps(left: Sequence[int] | np.ndarray, least: int, most: int) -> int:
    """Decode steps of a call: until fewer than `least` rows are active, the longest has ended, or `most` are done."""
    ordered = np.sort(left)
    return int(min(most, ordered[-1], ordered[len(ordered) - least]))
