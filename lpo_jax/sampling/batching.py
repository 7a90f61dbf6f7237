"""Continuous batching with plain attention: the host decides between calls of `decode` which rows are on the device.

Finished rows free their slots for queued ones. The last active rows also move into a smaller batch, and the response
cache is only as long as the longest active row needs. Nothing of this changes a row: its tokens depend on its prompt
and its own random key alone. With kernels, `lpo_jax.sampling.paging` takes the place of this file.

If all rows have a slot from the start, slots are contiguous by prompt and no index map is needed. Otherwise, or once
rows have moved, two small maps tell attention which slots share a prompt (`DecodeState.members`, `.member_index`).

On a mesh whose devices share the prompts, each shard has its own prompts with all their rows, its own slots and its
own queue; nothing moves between shards. One device is one shard.

A row may begin with tokens that an earlier call drew, with the same weights or others. When it enters a slot, the keys
and values of these tokens are computed again, by a prefill of its prompt and them. Rows that are not required wait
behind those that are, and take free slots only; sampling ends with the last required row.

Axes: P prompts · K responses · R slots · U prompts in the cache. R and U are ordered shard by shard.
"""

import collections

import numpy as np

from lpo_jax.models.placement import committed
from lpo_jax.sampling import decode as device
from lpo_jax.sampling import kv_cache
from lpo_jax.sampling.kv_cache import EMPTY, Capacity, PromptCache, ResponseCache
from lpo_jax.sampling.padding import next_power_of_two, pad_to
from lpo_jax.sampling.rows import IDLE, Batcher

MIN_SLOTS = 8  # a smaller batch is no faster: its time is that of reading the weights
# The fewest slots of a shard in the last call, which is short: a smaller batch would gain less time than its program
# takes to compile.
LAST_SLOTS = 64


class ContinuousBatcher(Batcher):
    """Samples rows with plain attention. Arguments are those of `Batcher`."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        rows, max_tokens = self.tokens.shape
        capacity = Capacity.of(rows // self.K, self.K, max_tokens, self.max_rows, self.shards)
        self.queues: list[collections.deque[int]] = [collections.deque() for _ in range(self.shards)]
        if capacity.queued:
            self.row_of = np.full(capacity.slots, EMPTY)  # [R] the row in each slot
            for row in np.flatnonzero(self.remaining).tolist():
                self.queues[row * self.shards // rows].append(row)
        else:
            self.row_of = np.arange(rows)
        self.contiguous = not capacity.queued
        # Rows in slots whose earlier tokens have no keys and values yet.
        self.entered = [] if capacity.queued else np.flatnonzero(self.remaining & (self.lengths > 0)).tolist()
        self.members_per_prompt = self.K  # C
        allocate = lambda *size: committed(  # noqa: E731
            kv_cache.allocate(self.settings.config, self.settings.stored, *size)
        )
        self.prompt_cache = PromptCache(self.prefill_prompts, allocate, self.prompts, capacity, self.shards)
        self.response_cache = ResponseCache(allocate, capacity, self._longest())

    def _arrange(self) -> None:
        self._admit()
        entered, self.entered = self.entered, []
        self._prefill_rows(entered)
        self._compact()
        more = min(self.settings.call_tokens, self._tokens_left())
        self.response_cache.reserve(more, self._longest())

    def _longest(self) -> int:
        """The largest number of tokens that an active or queued row has."""
        return int(self.lengths[self.remaining].max(initial=0))

    def _admit(self) -> None:
        """Moves queued rows into free slots, as long as there is an entry in the prompt cache for their prompts."""
        while any(self.queues) and (entries := self._fill_slots()):
            prompts = [(row // self.K for row in queue) for queue in self.queues]
            self.prompt_cache.insert(entries, prompts)

    def _fill_slots(self) -> dict[int, tuple[int, int]]:
        """Fills the free slots of each shard until a row's prompt is not in the cache.

        Returns:
          For each shard that needs another prompt: the prompt, and the index of a free entry of the shard's cache.
        """
        entries = {}
        parts = zip(
            self.queues, *map(self._by_shard, (self.row_of, self._active(), self.prompt_cache.prompt_of))
        )
        for shard, (queue, row_of, active, prompts) in enumerate(parts):
            for slot in np.flatnonzero(~active):
                if not queue:
                    break
                if queue[0] // self.K not in prompts:
                    unused = ~np.isin(prompts, row_of[active] // self.K)
                    if unused.any():
                        entries[shard] = queue[0] // self.K, int(unused.argmax())
                    break
                row_of[slot], active[slot] = queue.popleft(), True
                if self.lengths[row_of[slot]]:
                    self.entered.append(row_of[slot])
        return entries

    def _insert_rows(self, batch, prefilled, lengths):
        n, slots = len(self.row_of) // self.shards, {row: i for i, row in enumerate(self.row_of.tolist())}
        index = np.array([slots[row] % n if row != EMPTY else n for row in batch], np.int32)
        self.response_cache.insert(prefilled, index, lengths)

    def _compact(self) -> None:
        """Moves the last active rows into half as many slots or fewer.

        Prompts without active rows are dropped, but not for the last call, which needs fewer programs that way.
        """
        active = self._by_shard(self._active())
        most = active.sum(1).max()
        if any(self.queues) or most > self._smaller_size():
            return
        R = max(self._fewest_slots(), next_power_of_two(most))
        slots = [np.flatnonzero(part) for part in active]
        rows = [row_of[part] for row_of, part in zip(self._by_shard(self.row_of), slots)]
        self.response_cache.keep(np.concatenate([pad_to(part, R) for part in slots]))
        self.row_of = np.concatenate([pad_to(part, R, value=EMPTY) for part in rows])
        self.contiguous = False
        if not self._is_last_call():
            self.prompt_cache.keep([np.unique(part // self.K) for part in rows])
            counts = np.bincount(np.concatenate(rows) // self.K)
            self.members_per_prompt = min(self.K, next_power_of_two(counts.max()))

    def _is_last_call(self) -> bool:
        """Whether a call is long enough for all tokens that the active rows may still draw."""
        return self._tokens_left() <= self.settings.call_tokens

    def _fewest_slots(self) -> int:
        return LAST_SLOTS if self._is_last_call() else MIN_SLOTS

    def _smaller_size(self) -> int:
        """The next smaller number of slots per shard; 0: there is none."""
        half = next_power_of_two(len(self.row_of) // self.shards // 2 + 1) // 2
        return half if half >= self._fewest_slots() else 0

    def _min_active(self) -> int:
        """With fewer active slots than this, `decode` returns so that queued rows can enter or active rows can move."""
        active, smaller = len(self._active_slots()), self._smaller_size() * self.shards
        if any(self.queues):
            return max(active - len(self.row_of) // IDLE, 1)
        return smaller + 1 if active > smaller else 1

    def _draw(self, slots: np.ndarray) -> device.DecodeOutput:
        maps: tuple[np.ndarray | None, ...] = (None, None)
        if not self.contiguous:
            maps = self._member_maps(slots, self.prompt_cache.prompt_of, self.members_per_prompt)
        cache = self.response_cache
        out, cache.kv = device.decode(
            self.settings,
            self.weights,
            self._state(*maps),
            self.prompt_cache.lengths(),
            self.prompt_cache.kv,
            cache.kv,
            np.int32(cache.index),
            np.int32(min(self.settings.call_tokens, cache.tokens - cache.index, self._tokens_left())),
            np.int32(self._min_active()),
        )
        return out

    def _record(self, out: device.DecodeOutput) -> list[int]:
        ended = super()._record(out)
        self.response_cache.index += int(out.steps)
        return ended
