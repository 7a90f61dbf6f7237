"""Continuous batching with kernels: the KV cache is in pages, and as many rows are on the device as the pages allow.

`lpo_jax.sampling.pages` decides between calls of `decode_pages` which rows are in slots and which pages they have; here
its decisions are carried out. A row that is set aside keeps its tokens. When it enters again, their keys and values are
computed by a prefill, as for rows that begin with tokens of an earlier call (`lpo_jax.sampling.rows`). Nothing of this
changes a row: its tokens depend on its prompt and its own random key alone. Neither slots nor pool change size, so that
one program decodes everything.

Axes: P prompts · K responses · R slots · U prompts in the cache · M pages of the longest row. R and U are ordered shard
by shard, and pages are counted within the shard.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lpo_jax.models.placement import committed
from lpo_jax.sampling import decode as device
from lpo_jax.sampling import page_pool, pages
from lpo_jax.sampling.kv_cache import EMPTY, PromptPrefill
from lpo_jax.sampling.rows import IDLE, Batcher


class PagedBatcher(Batcher):
    """Samples rows with kernels, in pages.

    Args:
      arguments, options: those of `Batcher`.
      kv_tokens: tokens of prompts and responses that the KV caches of all shards hold together; 0: as many as all rows
        of full length need.

    Raises:
      UserError: the cache is too small for the longest row.
    """

    def __init__(self, *arguments, kv_tokens: int, **options):
        super().__init__(*arguments, **options)
        K, S, (rows, T) = self.K, self.prompts.tokens.shape[1], self.tokens.shape
        self.size = pages.Pool.of(rows // K, K, S, T, self.max_rows, kv_tokens, self.shards)
        self.size.check(int(self.prompts.lengths.max()), int(self.budgets.max()))
        self._prompt_pages, self._row_pages = max(1, self.size.pages_of(S - 1)), self.size.pages_of(T)
        self.admissions = [
            pages.Admission(self.size, part, K, self.prompts.lengths - 1)
            for part in (
                [row for row in shard if self.remaining[row]]
                for shard in self._by_shard(np.arange(rows)).tolist()
            )
        ]
        batch = self.shards * max(1, self.size.slots // K)  # prompts whose rows fill the slots
        self.prompt_prefill = PromptPrefill(self.prefill_prompts, batch, self.shards)
        pool = self.shards * self.size.pages, self.size.page_size
        self.pool = committed(page_pool.allocate_pool(self.settings.config, self.settings.stored, *pool))

    def _arrange(self) -> None:
        needed = np.minimum(self.lengths + self.settings.call_tokens, self.budgets)
        moves = [admission.schedule(needed) for admission in self.admissions]
        self.row_of = self._spread((admission.slot_of for admission in self.admissions), self.size.slots)
        self.prompt_of = self._spread(
            (admission.entry_of for admission in self.admissions), self.size.prompts
        )
        self._prefill_prompts([list(move.prompts) for move in moves])
        self._prefill_rows(row for move in moves for row in move.entered if self.lengths[row])

    def _prefill_prompts(self, missing: list[list[int]]) -> None:
        """Computes the keys and values of prompts that have pages: `missing` of each shard, emptied here."""
        ahead = self.prompt_prefill
        while any(missing):
            queues = [
                [*new, *(p for row in admission.queue if (p := row // self.K) not in admission.entry_of)]
                for new, admission in zip(missing, self.admissions)
            ]
            ahead.request([new[0] for new in missing if new], queues)
            table: list[list[int]] = [[] for _ in range(ahead.size)]
            for shard, (new, admission) in enumerate(zip(missing, self.admissions)):
                for prompt in [prompt for prompt in new if prompt in ahead.index]:
                    new.remove(prompt)
                    at = shard * ahead.size // self.shards + ahead.index.pop(prompt)
                    table[at] = admission.prompt_pages_of[prompt]
            self.pool = page_pool.insert_sequences(
                self.pool, ahead.kv, self._table(table, self._prompt_pages)
            )

    def _prefilled_at_once(self, tokens: int) -> int:
        # No more memory than the prefill of prompts takes, unless a single row needs it.
        prompts = self.prompt_prefill.size // self.shards * self.prompts.tokens.shape[1]
        return max(1, min(super()._prefilled_at_once(tokens), prompts // tokens))

    def _insert_rows(self, batch, prefilled, lengths):
        n = len(batch) // self.shards
        table = [self.admissions[i // n].pages_of.get(row, []) for i, row in enumerate(batch)]
        # A row begins with the last token of its prompt.
        first = np.array([self.prompts.lengths[row // self.K] - 1 if row != EMPTY else 0 for row in batch])
        self.pool = page_pool.insert_sequences(
            self.pool, prefilled, self._table(table, self._row_pages), first.astype(np.int32)
        )

    def _draw(self, slots: np.ndarray) -> device.DecodeOutput:
        queued = any(admission.queue for admission in self.admissions)
        needed = np.isin(self.prompt_of, self.row_of[slots] // self.K)
        rows = [
            self.admissions[i // self.size.slots].pages_of.get(row, [])
            for i, row in enumerate(self.row_of.tolist())
        ]
        prompts = [
            self.admissions[i // self.size.prompts].prompt_pages_of.get(prompt, [])
            for i, prompt in enumerate(self.prompt_of.tolist())
        ]
        out, self.pool = device.decode_pages(
            self.settings,
            self.weights,
            self._state(*self._member_maps(slots, self.prompt_of, min(self.K, self.size.slots))),
            np.where(needed, self.prompts.lengths[self.prompt_of], 1),  # of the others nothing is read
            self._table(prompts, self._prompt_pages),
            self._table(rows, self._row_pages),
            self.pool,
            np.int32(min(self.settings.call_tokens, self._tokens_left())),
            np.int32(max(len(slots) - len(self.row_of) // IDLE, 1) if queued else 1),
        )
        return out

    def _record(self, out: device.DecodeOutput) -> list[int]:
        ended = super()._record(out)
        for row in ended:
            self.admissions[row * self.shards // len(self.budgets)].end(row)
        return ended

    def _spread(self, index_of: Iterable[Mapping[int, int]], size: int) -> np.ndarray:
        """Return `[shards size]`: the number that each shard's map sends to each index, or EMPTY."""
        out = np.full((self.shards, size), EMPTY)
        for part, index in zip(out, index_of):
            part[list(index.values())] = list(index)
        return out.ravel()

    def _table(self, lists: Sequence[Sequence[int]], width: int) -> np.ndarray:
        """Return lists of pages as an array `[n, width]`, padded with a number past the end of the pool."""
        table = np.full((len(lists), width), self.size.pages, np.int32)
        for row, numbers in zip(table, lists):
            row[: len(numbers)] = numbers
        return table
