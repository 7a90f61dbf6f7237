"""Admission by pages: which rows are on the device, and which pages of the KV cache belong to each of them.

The KV cache of a shard is a pool of pages of X tokens each. A row takes pages as it grows and returns them when it
ends. The pages of a prompt exist once, whatever the number of its rows on the device. When the pool runs dry, the
youngest rows are set aside: they return their pages, keep their tokens, and enter again later, when the keys and values
of these tokens are computed again.

Rows enter in the order of their queue, and the last to enter are the first to be set aside. The rows on the device are
therefore always the first ones of those that remain, and the oldest one always fits, so that sampling makes progress.

This file is host code without arrays of a device. It needs lengths only, so a simulation can drive it:

    admission = Admission(pool, range(P * K), K, prompt_tokens)
    while admission.active or admission.queue:
        admission.schedule(np.minimum(lengths + call_tokens, final_lengths))
        for row in list(admission.active):
            lengths[row] = min(lengths[row] + call_tokens, final_lengths[row])
            if lengths[row] == final_lengths[row]:
                admission.end(row)

Axes: P prompts · K responses · R slots · U prompts in the cache · X tokens of a page.
"""

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np

from lpo_jax.errors import UserError

PAGE = 128  # X: the lanes of a TPU's vector registers
# In a pool that may run dry, a row enters only if one in so many pages stays free, so that active rows can grow for a
# while. With fewer free pages, rows are set aside more often; with more, fewer rows are active.
HEADROOM = 16
# Page numbers of a table, which a kernel has in the scalar memory of a chip, 1 MiB, with the list of what it reads.
TABLE = 1 << 17


@dataclasses.dataclass(frozen=True)
class Pool:
    """Sizes of the KV cache of one shard.

    Attributes:
      pages: number of pages.
      page_size: X.
      slots: R, the largest number of rows on the device at once.
      prompts: U, the largest number of prompts in the cache.
      headroom: pages that stay free when a row enters.
    """

    pages: int
    page_size: int
    slots: int
    prompts: int
    headroom: int = 0

    @classmethod
    def of(cls, P: int, K: int, S: int, T: int, max_rows: int, kv_tokens: int, shards: int) -> "Pool":
        """Return the sizes for P prompts of at most S tokens with K responses of at most T tokens each.

        Args:
          P: a multiple of `shards`.
          max_rows: limit on the rows of all shards together, of which each shard gets at least one; 0: no limit.
          kv_tokens: tokens of prompts and responses that all shards together hold; 0: as many as `max_rows` rows of
            full length and their prompts.
        """
        queued = 0 < max_rows < P * K
        slots = max(1, max_rows // shards) if queued else P // shards * K
        prompts = min(P // shards, 4 * max(1, slots // K))
        whole = cls(0, PAGE, slots, prompts)
        # The last token of a prompt is stored with the row.
        pages = prompts * whole.pages_of(S - 1) + slots * whole.pages_of(T)
        if kv_tokens and kv_tokens // shards // PAGE < pages:
            pages = kv_tokens // shards // PAGE
            return dataclasses.replace(whole, pages=pages, headroom=pages // HEADROOM)
        return dataclasses.replace(whole, pages=pages)

    def pages_of(self, tokens: int) -> int:
        """Return the number of pages that hold so many tokens."""
        return -(-int(tokens) // self.page_size)

    def check(self, S: int, T: int) -> None:
        """Checks that the longest possible row, of S prompt and T response tokens, fits, and the table of all rows.

        Raises:
          UserError: they do not.
        """
        needed = self.pages_of(S - 1) + self.pages_of(T)
        if needed > self.pages:
            raise UserError(
                f"sampling.kv_tokens: {self.pages} pages of {self.page_size} tokens for each shard of the prompts, but "
                f"one row of {S} prompt and {T} response tokens needs {needed}; raise it, or set it to 0 for a cache "
                "that holds all rows"
            )
        if (entries := self.slots * self.pages_of(T)) > TABLE:
            raise UserError(
                f"sampling.max_rows: {self.slots} rows of up to {T} tokens for each shard of the prompts have a table "
                f"of {entries} pages, but a kernel takes at most {TABLE}; decode fewer rows at once"
            )


@dataclasses.dataclass(frozen=True)
class Moves:
    """What changes before the next call of `decode`.

    Attributes:
      set_aside: rows that have returned their slots and pages, and wait in the queue again.
      entered: rows that have a slot and pages now. Those that have tokens already need a prefill of them.
      prompts: prompts that have pages now and need a prefill.
    """

    set_aside: list[int]
    entered: list[int]
    prompts: list[int]


class Admission:
    """The rows of one shard: queued or active, with their slots and pages.

    Attributes:
      queue: queued rows, the next one first.
      active: rows on the device, the oldest first.
      slot_of: the slot of each active row.
      pages_of: page numbers of each active row, in the order of its tokens.
      entry_of: the entry, in [0, U), of each prompt in the cache.
      prompt_pages_of: page numbers of each prompt in the cache.

    Args:
      pool: the sizes. The longest row has to fit (`Pool.check`).
      rows: all rows, p K + k, in the order in which they are to be sampled.
      K: responses per prompt.
      prompt_tokens: `[P]` tokens of each prompt that the cache holds.
    """

    def __init__(self, pool: Pool, rows: Iterable[int], K: int, prompt_tokens: np.ndarray):
        self.pool, self.queue = pool, collections.deque(rows)
        self.active: list[int] = []
        self.slot_of: dict[int, int] = {}
        self.pages_of: dict[int, list[int]] = {}
        self.entry_of: dict[int, int] = {}
        self.prompt_pages_of: dict[int, list[int]] = {}
        self._K, self._prompt_tokens = K, prompt_tokens
        # In descending order, so that the lowest numbers are taken first.
        self._free, self._slots, self._entries = (
            list(range(n))[::-1] for n in (pool.pages, pool.slots, pool.prompts)
        )
        self._rows_left = collections.Counter(
            row // K for row in self.queue
        )  # by prompt, rows that have not ended
        self._users: collections.Counter[int] = collections.Counter()  # by prompt, its active rows

    @property
    def free_pages(self) -> int:
        """The number of pages that no row needs: free ones and those of prompts without an active row."""
        return len(self._free) + sum(len(self.prompt_pages_of[p]) for p in self._unused())

    def schedule(self, needed: np.ndarray) -> Moves:
        """Gives the active rows the pages they need, sets rows aside if there are too few, and admits queued rows.

        Args:
          needed: by row, the tokens of its response that the cache has to hold when the next call of `decode` ends.
        """
        set_aside = self._grow(needed)
        entered, prompts = self._admit(needed)
        return Moves(set_aside, entered, prompts)

    def end(self, row: int) -> None:
        """Frees the slot and the pages of a finished row."""
        self._remove(row)
        prompt = row // self._K
        self._rows_left[prompt] -= 1
        if not self._rows_left[prompt]:
            self._drop(prompt)

    def _grow(self, needed: np.ndarray) -> list[int]:
        set_aside = []
        for row in list(self.active):  # the oldest first
            if row not in self.slot_of:  # set aside below, as all that are younger
                break
            missing = self.pool.pages_of(needed[row]) - len(self.pages_of[row])
            while missing > len(self._free) and row in self.slot_of:
                if unused := self._unused():
                    self._drop(unused[-1])
                    continue
                youngest = self.active[-1]
                self._remove(youngest)
                self.queue.appendleft(youngest)
                set_aside.append(youngest)
            if row in self.slot_of:
                self.pages_of[row] += [self._free.pop() for _ in range(missing)]
        return set_aside

    def _admit(self, needed: np.ndarray) -> tuple[list[int], list[int]]:
        entered, prompts = [], []
        while self.queue and self._slots:
            row = self.queue[0]
            prompt, own = row // self._K, self.pool.pages_of(needed[row])
            cached = self.prompt_pages_of.get(prompt)
            shared = self.pool.pages_of(self._prompt_tokens[prompt]) if cached is None else 0
            unused = [p for p in self._unused() if p != prompt]
            free = len(self._free) + sum(len(self.prompt_pages_of[p]) for p in unused)
            headroom = self.pool.headroom if self.active else 0
            if own + shared + headroom > free or (cached is None and not self._entries and not unused):
                break
            while len(self._free) < own + shared or (cached is None and not self._entries):
                self._drop(unused.pop())
            if cached is None:
                self.entry_of[prompt] = self._entries.pop()
                self.prompt_pages_of[prompt] = [self._free.pop() for _ in range(shared)]
                prompts.append(prompt)
            self.queue.popleft()
            self.active.append(row)
            self.slot_of[row] = self._slots.pop()
            self.pages_of[row] = [self._free.pop() for _ in range(own)]
            self._users[prompt] += 1
            entered.append(row)
        return entered, prompts

    def _unused(self) -> list[int]:
        """Prompts in the cache without an active row; the last ones are dropped first."""
        return [prompt for prompt in self.prompt_pages_of if not self._users[prompt]]

    def _remove(self, row: int) -> None:
        self.active.remove(row)
        self._slots.append(self.slot_of.pop(row))
        self._free += self.pages_of.pop(row)
        self._users[row // self._K] -= 1

    def _drop(self, prompt: int) -> None:
        self._free += self.prompt_pages_of.pop(prompt)
        self._entries.append(self.entry_of.pop(prompt))
