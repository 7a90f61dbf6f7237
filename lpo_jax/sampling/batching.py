"""Continuous batching: the host decides between calls of `decode` which rows are on the device.

Finished rows free their slots for queued ones. With plain attention, the last active rows also move into a smaller
batch, and the response cache is only as long as the longest active row needs. Nothing of this changes a row: its tokens
depend on its prompt and its own random key alone.

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
import functools
from collections.abc import Callable, Iterable

import numpy as np

from lpo_jax.models import decoder
from lpo_jax.models.attention import uses_kernels
from lpo_jax.models.prompt_images import PromptImages
from lpo_jax.parallel import hosts, sharding
from lpo_jax.sampling import decode as device
from lpo_jax.sampling import kv_cache
from lpo_jax.sampling.kv_cache import CHUNK, EMPTY, Capacity, PromptCache, ResponseCache
from lpo_jax.sampling.padding import NO_LIMIT, next_power_of_two, pad_prompts, pad_to
from lpo_jax.sampling.request import PromptBatch
from lpo_jax.sampling.responses import Responses
from lpo_jax.sampling.stop_strings import StopFinder

MIN_SLOTS = 8  # a smaller batch is no faster: its time is that of reading the weights
PREFILL_ROWS = 8  # rows of each shard whose earlier tokens are prefilled together
IDLE = 16  # while rows are queued, one slot in so many may be idle before `decode` returns to have it filled


class ContinuousBatcher:
    """Samples P K rows, of which at most `max_rows` are on the device at once. An object serves one call of `run`.

    Rows are numbered p K + k.

    Args:
      settings: static argument of `decode`.
      weights: in decode layout.
      prompts: P of them, a multiple of the number of shards.
      keys: `[P, K, 2]` uint32, data of `row_keys`.
      budgets: `[P, K]` maximum number of tokens; 0: the row is not sampled.
      started: the responses so far, with capacity for as many tokens as the largest budget; new ones are written to it.
      version: recorded with each token that is drawn.
      max_rows: limit on the slots of all shards together, of which each shard gets at least one; 0: no limit.
      find_stop: finds stop strings; None: there are none.
      on_finished: called with p, k and the token ids of a finished required row, while the device continues with other
        rows.
      required: `[P]` bool, prompts whose rows are sampled to their end; in each shard they come first. None: all.
      images: of the prompts; the vision tower runs once over all of them. None: there are none.
    """

    def __init__(
        self,
        settings: device.DecodeSettings,
        weights: decoder.Params,
        prompts: PromptBatch,
        keys: np.ndarray,
        budgets: np.ndarray,
        started: Responses,
        version: int,
        max_rows: int,
        find_stop: StopFinder | None,
        on_finished: Callable[[int, int, list[int]], None] | None,
        required: np.ndarray | None = None,
        images: PromptImages | None = None,
    ):
        self.settings, self.weights, self.prompts = settings, weights, prompts
        self.keys, self.budgets = keys.reshape(-1, 2), budgets.reshape(-1).astype(np.int32)
        self.find_stop, self.on_finished, self.version = find_stop, on_finished, version
        P, self.K = budgets.shape
        rows, max_tokens = P * self.K, started.tokens.shape[-1]
        self.responses = started
        by_row = {name: x.reshape(rows, *x.shape[2:]) for name, x in vars(started).items()}  # views
        # Of tokens, in the order of `DecodeOutput`.
        self.of_tokens = [by_row[name] for name in ("tokens", "log_probs", "entropies")]
        self.tokens, self.versions = by_row["tokens"], by_row["versions"]
        self.lengths, self.finished, self.row_steps = (
            by_row[x] for x in ("lengths", "finished", "row_steps")
        )
        self.remaining = (self.lengths < self.budgets) & ~self.finished  # rows that are queued or active
        self.required = np.repeat(np.ones(P, bool) if required is None else required, self.K)

        self.shards = sharding.batch_shards()
        capacity = Capacity.of(P, self.K, max_tokens, max_rows, self.shards)
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
        # Kernels read only the tokens that a row has, so that neither slots nor the cache need to change size.
        self.fixed = uses_kernels(settings.attention)
        allocate = functools.partial(kv_cache.allocate, settings.config, settings.dtype)
        self.prefill = functools.partial(
            kv_cache.prefill, settings.config, settings.dtype, settings.attention, weights
        )
        # What the position of a response differs by from its index in the sequence.
        self.shift = np.zeros(P, np.int32) if images is None else images.next
        if images is not None:
            seen = kv_cache.image_outputs(settings.config, settings.dtype, weights, images.rows)
            self.prefill = functools.partial(self.prefill, seen=seen)
        self.prompt_cache = PromptCache(self.prefill, allocate, prompts, capacity, self.shards, images)
        self.response_cache = ResponseCache(allocate, capacity, not self.fixed, self._longest())

    def run(self) -> Responses:
        """Samples all required rows to their end, and others as far as they come. Returns all of them."""
        ended = np.flatnonzero(~self.remaining & (self.budgets > 0)).tolist()  # by an earlier call
        while (self.remaining & self.required).any():
            self._admit()
            self._prefill_entered()
            self._compact()
            self.response_cache.reserve(min(CHUNK, self._tokens_left()), self._longest())
            out = self._decode()
            self._report(ended)  # while the device decodes
            ended = self._record(out)
        self._report(ended)
        return self.responses

    def _longest(self) -> int:
        """The largest number of tokens that an active or queued row has."""
        return int(self.lengths[self.remaining].max(initial=0))

    def _active(self) -> np.ndarray:
        """`[R]` bool: which slots hold a row that is not finished."""
        return (self.row_of != EMPTY) & self.remaining[self.row_of]

    def _active_slots(self) -> np.ndarray:
        return np.flatnonzero(self._active())

    def _by_shard(self, x: np.ndarray) -> np.ndarray:
        """`[shards, ...]` view of an array over slots or cached prompts."""
        return x.reshape(self.shards, -1)

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

    def _prefill_entered(self) -> None:
        """Computes the keys and values of the tokens that rows in new slots have drawn in earlier calls."""
        if not self.entered:
            return
        n, slots = len(self.row_of) // self.shards, {row: i for i, row in enumerate(self.row_of.tolist())}
        # Rows of similar length share a batch.
        entered = sorted(map(int, self.entered), key=lambda row: self.lengths[row], reverse=True)
        queues = [[row for row in entered if slots[row] // n == shard] for shard in range(self.shards)]
        self.entered = []
        while any(queues):
            parts = [queue[:PREFILL_ROWS] for queue in queues]
            queues = [queue[PREFILL_ROWS:] for queue in queues]
            batch = [row for part in parts for row in [*part, *[EMPTY] * (PREFILL_ROWS - len(part))]]
            # The last token is fed by `decode`.
            ids = [self._sequence(row)[:-1] if row != EMPTY else [0] for row in batch]
            tokens, lengths = pad_prompts(ids, NO_LIMIT)
            index = np.array([slots[row] % n if row != EMPTY else n for row in batch], np.int32)
            self.response_cache.insert(self.prefill(tokens, lengths), index, lengths)

    def _sequence(self, row: int) -> list[int]:
        """Token ids of a row's prompt and of its response so far."""
        p = row // self.K
        prompt = self.prompts.tokens[p, : self.prompts.lengths[p]]
        return [*prompt.tolist(), *self.tokens[row, : self.lengths[row]].tolist()]

    def _compact(self) -> None:
        """Moves the last active rows into half as many slots or fewer, and keeps only their prompts."""
        active = self._by_shard(self._active())
        most = active.sum(1).max()
        if self.fixed or any(self.queues) or most > self._smaller_size() or self._tokens_left() <= CHUNK:
            return
        R = max(MIN_SLOTS, next_power_of_two(most))
        slots = [np.flatnonzero(part) for part in active]
        rows = [row_of[part] for row_of, part in zip(self._by_shard(self.row_of), slots)]
        self.response_cache.keep(np.concatenate([pad_to(part, R) for part in slots]))
        self.row_of = np.concatenate([pad_to(part, R, value=EMPTY) for part in rows])
        self.prompt_cache.keep([np.unique(part // self.K) for part in rows])
        counts = np.bincount(np.concatenate(rows) // self.K)
        self.members_per_prompt = min(self.K, next_power_of_two(counts.max()))
        self.contiguous = False

    def _smaller_size(self) -> int:
        """The next smaller number of slots per shard; 0: there is none."""
        half = next_power_of_two(len(self.row_of) // self.shards // 2 + 1) // 2
        return half if half >= MIN_SLOTS else 0

    def _tokens_left(self) -> int:
        """The number of tokens that an active row may still draw, maximum over rows."""
        rows = self.row_of[self._active_slots()]
        return int((self.budgets - self.lengths)[rows].max())

    def _min_active(self) -> int:
        """With fewer active slots than this, `decode` returns so that queued rows can enter or active rows can move."""
        active, smaller = len(self._active_slots()), self._smaller_size() * self.shards
        if any(self.queues):
            return max(active - len(self.row_of) // IDLE, 1)
        return smaller + 1 if active > smaller and not self.fixed else 1

    def _decode(self) -> device.DecodeOutput:
        """Starts a call of `decode`; its arrays may still be being computed when this returns."""
        slots, prompts = self._active_slots(), np.maximum(self.row_of, 0) // self.K
        drawn, prompt_lengths = self.lengths[self.row_of], self.prompts.lengths[prompts]
        members, member_index = (None, None) if self.contiguous else self._member_maps(slots)
        state = device.DecodeState(
            token=np.where(
                drawn > 0,
                self.tokens[self.row_of, drawn - 1],
                self.prompts.tokens[prompts, prompt_lengths - 1],
            ),
            start=prompt_lengths - 1 + self.shift[prompts],
            drawn=drawn,
            budget=self.budgets[self.row_of],
            active=self._active(),
            keys=self.keys[self.row_of],
            members=members,
            member_index=member_index,
        )
        cache = self.response_cache
        out, cache.kv = device.decode(
            self.settings,
            self.weights,
            state,
            self.prompt_cache.lengths(self.row_of[slots] // self.K),
            self.prompt_cache.kv,
            cache.kv,
            np.int32(cache.index),
            np.int32(min(CHUNK, cache.tokens - cache.index, self._tokens_left())),
            np.int32(self._min_active()),
        )
        return out

    def _member_maps(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `members [U, C]` and `member_index [R]` of the active slots; indices count within each shard."""
        prompt_of = self.prompt_cache.prompt_of
        C, R, U = self.members_per_prompt, len(self.row_of) // self.shards, len(prompt_of) // self.shards
        members = np.zeros((len(prompt_of), C), np.int32)
        member_index = np.zeros(len(self.row_of), np.int32)
        entry_of = {prompt: u for u, prompt in enumerate(prompt_of.tolist())}
        counts: collections.Counter[int] = collections.Counter()
        for slot in slots.tolist():
            u = entry_of[self.row_of[slot] // self.K]
            members[u, counts[u]] = slot % R
            member_index[slot] = u % U * C + counts[u]
            counts[u] += 1
        return members, member_index

    def _record(self, out: device.DecodeOutput) -> list[int]:
        """Stores what was drawn. Returns the rows that it finished."""
        slots = self._active_slots()
        out = hosts.to_host(out)
        self.response_cache.index += int(out.steps)
        rows = self.row_of[slots]
        self.row_steps[rows] += int(out.steps) * len(self.row_of) / len(slots)
        for slot, row in zip(slots.tolist(), rows.tolist()):
            before, now = self.lengths[row], out.drawn[slot]
            for kept, new in zip(self.of_tokens, (out.tokens, out.log_probs, out.entropies)):
                kept[row, before:now] = new[slot, : now - before]
            self.versions[row, before:now] = self.version
            self.lengths[row], self.remaining[row] = now, out.active[slot]
            self.finished[row] = self.tokens[row, now - 1] in self.settings.eos_ids
            if self.find_stop:
                self._cut_at_stop(row)
        return rows[~self.remaining[rows]].tolist()

    def _cut_at_stop(self, row: int) -> None:
        """Ends a row behind the token that completed a stop string."""
        end = self.find_stop(self.tokens[row, : self.lengths[row]].tolist(), CHUNK)
        if end is not None:
            for kept in (*self.of_tokens, self.versions):
                kept[row, end:] = 0
            self.lengths[row], self.remaining[row], self.finished[row] = end, False, True

    def _report(self, ended: Iterable[int]) -> None:
        if self.on_finished:
            for row in ended:
                if self.required[row]:
                    p, k = divmod(row, self.K)
                    self.on_finished(p, k, self.tokens[row, : self.lengths[row]].tolist())
