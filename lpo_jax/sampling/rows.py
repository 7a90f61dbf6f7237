"""The rows of one call of the sampler: what the host knows about them, and the loop around calls of `decode`.

Axes: P prompts · K responses · R slots · U prompts in the cache · C slots that share a prompt. R and U are ordered
shard by shard.
"""

import abc
import collections
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from lpo_jax.models import decoder
from lpo_jax.models.prompt_images import PromptImages
from lpo_jax.parallel import hosts, sharding
from lpo_jax.sampling import decode as device
from lpo_jax.sampling import kv_cache
from lpo_jax.sampling.kv_cache import EMPTY, KVCache
from lpo_jax.sampling.padding import NO_LIMIT, bucket, pad_prompts
from lpo_jax.sampling.request import PromptBatch
from lpo_jax.sampling.responses import Responses
from lpo_jax.sampling.stop_strings import StopFinder

PREFILL_ROWS = 8  # most rows of each shard whose earlier tokens are prefilled together
IDLE = 16  # while rows are queued, one slot in so many may be idle before `decode` returns to have it filled

# Runs the vision tower over the images of all prompts of a call.
image_outputs = jax.jit(decoder.image_outputs, static_argnames=("config", "dtype"))


class Batcher(abc.ABC):
    """Samples P K rows, of which some are on the device at a time. An object serves one call of `run`.

    Rows are numbered p K + k. Subclasses decide which rows are in slots, and hold the KV cache.

    Attributes:
      row_of: `[R]` the row in each slot, or EMPTY.
      remaining: `[P K]` bool, rows that are queued or active.

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

    row_of: np.ndarray

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
        rows = P * self.K
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

        self.max_rows, self.shards = max_rows, sharding.batch_shards()
        self.prefill = functools.partial(
            kv_cache.prefill, settings.config, settings.dtype, settings.stored, settings.attention, weights
        )
        self.images = images
        # How much further on than its index in the sequence a response token's position is.
        self.shift = np.zeros(P, np.int32) if images is None else images.next
        if images is not None:
            outputs = image_outputs(settings.config, weights, images.rows, settings.dtype)
            self.prefill = functools.partial(self.prefill, outputs=outputs)
        # Not a method, because the caches keep it: a cycle would hold the weights and the KV cache in memory after the
        # call, until the garbage collector finds it.
        self.prefill_prompts = functools.partial(_prefill_prompts, self.prefill, prompts, images)

    def run(self) -> Responses:
        """Samples all required rows to their end, and others as far as they come. Returns all of them."""
        ended = np.flatnonzero(~self.remaining & (self.budgets > 0)).tolist()  # by an earlier call
        while (self.remaining & self.required).any():
            self._arrange()
            out = self._draw(self._active_slots())
            self._report(ended)  # while the device decodes
            ended = self._record(out)
        self._report(ended)
        return self.responses

    @abc.abstractmethod
    def _arrange(self) -> None:
        """Decides which rows are in slots in the next call of `decode`, and fills the KV cache."""

    @abc.abstractmethod
    def _draw(self, slots: np.ndarray) -> device.DecodeOutput:
        """Starts a call of `decode` for some slots; its arrays may still be being computed when this returns."""

    @abc.abstractmethod
    def _insert_rows(self, batch: Sequence[int], prefilled: KVCache, lengths: np.ndarray) -> None:
        """Copies prefilled sequences of prompt and response, `[n]` with so many tokens each, into the KV cache.

        Args:
          batch: the row of each, or EMPTY.
        """

    def _prefilled_at_once(self, tokens: int) -> int:
        """The number of rows of each shard that are prefilled together, padded to so many tokens."""
        return PREFILL_ROWS

    def _active(self) -> np.ndarray:
        """`[R]` bool: which slots hold a row that is not finished."""
        return (self.row_of != EMPTY) & self.remaining[self.row_of]

    def _active_slots(self) -> np.ndarray:
        return np.flatnonzero(self._active())

    def _by_shard(self, x: np.ndarray) -> np.ndarray:
        """`[shards, ...]` view of an array over slots or cached prompts."""
        return x.reshape(self.shards, -1)

    def _tokens_left(self) -> int:
        """The number of tokens that an active row may still draw, maximum over rows."""
        rows = self.row_of[self._active_slots()]
        return int((self.budgets - self.lengths)[rows].max())

    def _prefill_rows(self, rows: Iterable[int]) -> None:
        """Computes the keys and values of the tokens that rows have drawn before they entered their slots."""
        n, slots = len(self.row_of) // self.shards, {row: i for i, row in enumerate(self.row_of.tolist())}
        # Rows of similar length share a batch.
        entered = sorted(map(int, rows), key=lambda row: self.lengths[row], reverse=True)
        queues = [[row for row in entered if slots[row] // n == shard] for shard in range(self.shards)]
        while any(queues):
            # The last token is fed by `decode`.
            next_rows = [row for queue in queues for row in queue[:PREFILL_ROWS]]
            longest = max(len(self._sequence(row)) - 1 for row in next_rows)
            at_once = self._prefilled_at_once(bucket(longest, NO_LIMIT))
            parts = [queue[:at_once] for queue in queues]
            queues = [queue[at_once:] for queue in queues]
            batch = [row for part in parts for row in [*part, *[EMPTY] * (at_once - len(part))]]
            ids = [self._sequence(row)[:-1] if row != EMPTY else [0] for row in batch]
            tokens, lengths = pad_prompts(ids, NO_LIMIT)
            images = None
            if self.images is not None:
                prompts = np.maximum(batch, 0) // self.K
                images = self.images.extended(prompts, self.prompts.lengths[prompts], tokens.shape[1])
            self._insert_rows(batch, self.prefill(tokens, lengths, images), lengths)

    def _sequence(self, row: int) -> list[int]:
        """Token ids of a row's prompt and of its response so far."""
        p = row // self.K
        prompt = self.prompts.tokens[p, : self.prompts.lengths[p]]
        return [*prompt.tolist(), *self.tokens[row, : self.lengths[row]].tolist()]

    def _state(
        self, members: np.ndarray | None = None, member_index: np.ndarray | None = None
    ) -> device.DecodeState:
        """The argument of `decode` for the rows in the slots."""
        prompts = np.maximum(self.row_of, 0) // self.K
        drawn, prompt_lengths = self.lengths[self.row_of], self.prompts.lengths[prompts]
        return device.DecodeState(
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

    def _member_maps(self, slots: np.ndarray, prompt_of: np.ndarray, C: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `members [U, C]` and `member_index [R]` of the active slots; indices count within each shard.

        Args:
          prompt_of: `[U]` the prompt in each entry of the cache, or EMPTY.
        """
        R, U = len(self.row_of) // self.shards, len(prompt_of) // self.shards
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
        end = self.find_stop(self.tokens[row, : self.lengths[row]].tolist(), self.settings.call_tokens)
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


def _prefill_prompts(
    prefill: Callable[..., KVCache], prompts: PromptBatch, images: PromptImages | None, index: np.ndarray
) -> KVCache:
    """Computes the keys and values of the prompts with these indices."""
    chosen = None if images is None else images.take(index)
    return prefill(prompts.tokens[index], prompts.lengths[index], chosen)
