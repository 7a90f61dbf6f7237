"""The KV cache for plain attention: its layout on the device, and what the host knows about its content.

With kernels the cache is in pages (`lpo_jax.sampling.page_pool`). Without them there are two caches. `PromptCache`
holds the keys and values of each prompt once, whatever the number of its responses. `ResponseCache` holds those of the
tokens that each slot has drawn. Attention reads both and merges the two results by log-sum-exp
(`lpo_jax.models.attention.Decode`).

On a mesh whose devices share the prompts, each shard has its own prompts and slots, and indices on the device count
within the shard. One device is one shard.

Axes: P prompts · K responses · R slots · U prompts in the cache · S prompt tokens · T response tokens in the cache ·
G key/value heads · N head width. R and U are ordered shard by shard.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.models import decoder
from lpo_jax.models.attention import Causal
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.eight_bits import SCALE_BYTES, Stored, zeros
from lpo_jax.models.kernels.choice import Attention
from lpo_jax.models.prompt_images import PromptImages
from lpo_jax.models.rotary import mrope_table, rope_table
from lpo_jax.models.vision import ImageTokens
from lpo_jax.parallel import sharding
from lpo_jax.sampling import calls
from lpo_jax.sampling.padding import next_power_of_two, pad_to
from lpo_jax.sampling.request import PromptBatch

FIRST_TOKENS = 64  # initial T of a response cache that grows; it doubles as responses get longer
EMPTY = -1  # an entry without a prompt, or a slot without a row

# Per layer: keys [B, G, N, T] and values [B, G, T, N] of B sequences of T tokens. The products of decode attention read
# both in this layout, so that no step transposes a cache.
KVCache = list[tuple[Stored, Stored]]


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Sizes of the caches, over all shards together.

    Attributes:
      slots: R, rows that are decoded at once.
      prompts: U.
      prefill_batch: prompts that are prefilled together.
      tokens: maximum T of the response cache.
      queued: whether there are more rows than slots, so that rows wait in a queue.
    """

    slots: int
    prompts: int
    prefill_batch: int
    tokens: int
    queued: bool

    @classmethod
    def of(cls, P: int, K: int, max_tokens: int, max_rows: int, shards: int) -> "Capacity":
        """Return the capacity for P prompts with K responses each.

        Args:
          P: a multiple of `shards`.
          max_rows: limit on the slots of all shards together, of which each shard gets at least one; 0: no limit.
        """
        if not 0 < max_rows < P * K:
            return cls(P * K, P, P, max_tokens, False)
        slots = max(1, max_rows // shards)
        batch = max(1, slots // K)  # prompts whose rows fill the slots of a shard
        # Rows start at different times but write at the same index, so the cache also spans the start of older rows.
        # A quarter more than the longest response makes it rare that unused tokens must be dropped.
        tokens = max_tokens + max(calls.FEWEST, max_tokens // 4)
        return cls(shards * slots, shards * min(P // shards, 4 * batch), shards * batch, tokens, True)


def token_bytes(config: ModelConfig, dtype: np.dtype) -> int:
    """Return the bytes of the keys and values of one token in all layers."""
    scale = SCALE_BYTES if dtype.itemsize == 1 else 0
    return 2 * config.num_layers * config.num_kv_heads * (config.head_width * dtype.itemsize + scale)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def allocate(config: ModelConfig, dtype: np.dtype, sequences: int, tokens: int) -> KVCache:
    """Return a cache of zeros."""
    G, N = config.num_kv_heads, config.head_width
    kv = zeros((sequences, G, N, tokens), dtype, 2), zeros((sequences, G, tokens, N), dtype, 3)
    kv = jax.tree.map(lambda x: sharding.constrain(x, "batch", "kv_heads", None, None), kv)
    return [kv] * config.num_layers


def resize(cache: KVCache, sequences: np.ndarray | None, shift: np.int32, tokens: int) -> KVCache:
    """Return a cache of another size. The layers of `cache` are freed one by one, so two copies never coexist.

    Args:
      cache: emptied by this call.
      sequences: indices of the sequences to keep, within each shard; None: all.
      shift: number of tokens to drop at the start.
      tokens: T of the new cache.
    """
    for layer, (keys, values) in enumerate(cache):
        cache[layer] = None
        cache[layer] = (
            _resize(keys, sequences, shift, tokens, 3),
            _resize(values, sequences, shift, tokens, 2),
        )
    return cache


@functools.partial(jax.jit, static_argnums=(3, 4))
def _resize(stored, sequences, shift, tokens, axis):
    return jax.tree.map(lambda x: _resize_array(x, sequences, shift, tokens, axis), stored)


def _resize_array(x, sequences, shift, tokens, axis):
    x = x if sequences is None else sharding.on_each_shard(lambda x, index: x[index], x, sequences)
    x = jnp.roll(x, -shift, axis)[(slice(None),) * axis + (slice(tokens),)]
    return jnp.pad(x, [(0, tokens - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.jit, donate_argnums=0)
def insert_prompts(cache: KVCache, prefilled: KVCache, source: jax.Array, entry: jax.Array) -> KVCache:
    """Copies at most one prefilled prompt per shard into the cache.

    Args:
      source: `[shards]` index in `prefilled`.
      entry: `[shards]` index in `cache`; an index past the end copies nothing.
    """
    put = lambda x, new, source, entry: x.at[entry].set(new[source], mode="drop")  # noqa: E731
    return jax.tree.map(lambda x, new: sharding.on_each_shard(put, x, new, source, entry), cache, prefilled)


@functools.partial(jax.jit, donate_argnums=0)
def insert_rows(
    cache: KVCache, prefilled: KVCache, slots: jax.Array, lengths: jax.Array, index: jax.Array
) -> KVCache:
    """Copies the last keys and values of prefilled sequences into the response cache, in front of `index`.

    Args:
      prefilled: `[n]` sequences of prompt and response.
      slots: `[n]` slot of each within its shard; a slot past the end copies nothing.
      lengths: `[n]` tokens of each.
      index: scalar, where the next token is written. What a slot holds in front of its row's tokens is never read.
    """
    T = jax.tree.leaves(cache[0][1])[0].shape[2]

    def put(x, new, slots, lengths, index, axis):
        source = jnp.clip(lengths[:, None] - index + jnp.arange(T), 0, new.shape[axis] - 1)  # [n, T]
        source = source[:, None, None, :] if axis == 3 else source[:, None, :, None]
        return x.at[slots].set(jnp.take_along_axis(new, source, axis), mode="drop")

    def of_layer(old, new):
        def write(x, y, axis):
            return sharding.on_each_shard(lambda *arrays: put(*arrays, index, axis), x, y, slots, lengths)

        return tuple(
            jax.tree.map(functools.partial(write, axis=axis), x, y) for axis, x, y in zip((3, 2), old, new)
        )

    return [of_layer(old, new) for old, new in zip(cache, prefilled)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def prefill(
    config: ModelConfig,
    dtype: np.dtype,
    stored: np.dtype,
    attention: Attention,
    weights: decoder.Params,
    tokens: jax.Array,
    lengths: jax.Array,
    images: PromptImages | None = None,
    outputs: jax.Array | None = None,
) -> KVCache:
    """Computes the keys and values of prompts `tokens [U, S]` with `lengths [U]`.

    Args:
      dtype: of activations.
      stored: of the keys and values.
      images: of these prompts; None: there are none.
      outputs: `decoder.image_outputs` of all prompts.
    """
    tokens = sharding.constrain(tokens, "batch", None)
    U, S = tokens.shape
    valid = jnp.arange(S) < lengths[:, None]
    positions = jnp.broadcast_to(jnp.arange(S), (U, S))
    context = Causal(valid, positions, keep=stored, aligned=True, attention=attention)
    no_kv = [None] * config.num_layers
    rope, seen = rope_table(config, positions), None
    if images is not None:
        rope, seen = mrope_table(config, images.positions), ImageTokens.of(outputs, images.index)
    _, kept = decoder.forward(config, weights, tokens, rope, context, no_kv, seen, dtype=dtype)  # type: ignore[arg-type]
    keys = lambda x: jnp.transpose(x, (0, 2, 3, 1))  # noqa: E731
    values = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    return [(jax.tree.map(keys, k), jax.tree.map(values, v)) for k, v in kept]


class PromptPrefill:
    """Computes the keys and values of queued prompts, several of each shard together.

    Attributes:
      size: prompts that are prefilled together, over all shards.
      kv: those of the last prompts.
      index: where in its shard's part of `kv` each prompt is; callers remove what they have copied.

    Args:
      prefill: computes the keys and values of the prompts with the indices `[n]`.
      size: as the attribute.
    """

    def __init__(
        self,
        prefill: Callable[[np.ndarray], KVCache],
        size: int,
        shards: int,
    ):
        self._prefill, self.size, self._shards = prefill, size, shards
        self.kv: KVCache | None = None
        self.index: dict[int, int] = {}

    def request(self, wanted: Iterable[int], queues: Sequence[Iterable[int]]) -> None:
        """Makes sure that `kv` has some prompts.

        Args:
          wanted: at most one prompt of each shard.
          queues: for every shard, prompts that are not in the cache, those of `wanted` first. If one of `wanted` is not
            prefilled yet, the next prompts of all shards are prefilled together, which takes as long as one.
        """
        if all(prompt in self.index for prompt in wanted):
            return
        batch = np.zeros((self._shards, self.size // self._shards), np.int32)
        self.index = {}
        for row, queue in zip(batch, queues):
            coming = list(dict.fromkeys(queue))[: len(row)]
            row[: len(coming)] = coming
            self.index |= {prompt: i for i, prompt in enumerate(coming)}
        self.kv = None  # freed before the next one is computed
        self.kv = self._prefill(batch.ravel())


class PromptCache:
    """Keys and values of prompts, each stored once.

    Attributes:
      kv: U sequences of S tokens on the device.
      prompt_of: `[U]` the prompt in each entry, or EMPTY.

    Args:
      prefill: computes the keys and values of the prompts with the indices `[n]`.
      allocate: makes a cache of `(sequences, tokens)`.
      prompts: P of them. All are prefilled at once unless the capacity says that rows are queued.
    """

    def __init__(
        self,
        prefill: Callable[[np.ndarray], KVCache],
        allocate: Callable[[int, int], KVCache],
        prompts: PromptBatch,
        capacity: Capacity,
        shards: int,
    ):
        self._prompts, self._shards = prompts, shards
        self._prefilled = PromptPrefill(prefill, capacity.prefill_batch, shards)
        if capacity.queued:
            self.kv = allocate(capacity.prompts, prompts.tokens.shape[1])
            self.prompt_of = np.full(capacity.prompts, EMPTY)
        else:
            self.prompt_of = np.arange(len(prompts.lengths))
            self.kv = prefill(self.prompt_of)

    def insert(self, entries: dict[int, tuple[int, int]], queues: Sequence[Iterable[int]]) -> None:
        """Writes at most one prompt per shard into the cache.

        Args:
          entries: by shard, a prompt and the index of its entry within the shard.
          queues: for every shard, the prompts of its queued rows, in order.
        """
        missing = [(prompt for prompt in queue if prompt not in self.prompt_of) for queue in queues]
        self._prefilled.request((prompt for prompt, _ in entries.values()), missing)
        source = np.zeros(self._shards, np.int32)
        index = np.full(self._shards, len(self.prompt_of), np.int32)  # past the end: nothing is copied
        for shard, (prompt, entry) in entries.items():
            source[shard], index[shard] = self._prefilled.index.pop(prompt), entry
            self.prompt_of.reshape(self._shards, -1)[shard, entry] = prompt
        self.kv = insert_prompts(self.kv, self._prefilled.kv, source, index)

    def keep(self, needed: Sequence[np.ndarray]) -> None:
        """Drops all prompts but the `needed` ones of each shard, if that makes the cache smaller."""
        U = next_power_of_two(max(map(len, needed)))
        if U * self._shards >= len(self.prompt_of):
            return
        parts = self.prompt_of.reshape(self._shards, -1)
        entries = [np.flatnonzero(np.isin(part, prompts)) for part, prompts in zip(parts, needed)]
        index = np.concatenate([pad_to(x, U) for x in entries])
        self.kv = resize(self.kv, index, np.int32(0), self._prompts.tokens.shape[1])
        self.prompt_of = np.concatenate([pad_to(part[x], U, value=EMPTY) for part, x in zip(parts, entries)])

    def lengths(self) -> np.ndarray:
        """Return the tokens of each entry `[U]`."""
        return self._prompts.lengths[np.maximum(self.prompt_of, 0)]


class ResponseCache:
    """Keys and values of the tokens that the slots have drawn.

    T starts small and doubles on demand. All slots write at the same index, so that one slice update serves all of
    them. The tokens of a slot's row are the last ones before that index.

    Attributes:
      kv: R sequences of `tokens` tokens on the device.
      tokens: T, the allocated length.
      index: where the next token is written.

    Args:
      allocate: makes a cache of `(sequences, tokens)`.
      longest: tokens of the longest row that begins with some.
    """

    def __init__(self, allocate: Callable[[int, int], KVCache], capacity: Capacity, longest: int = 0):
        self._max_tokens = capacity.tokens
        self.index, self.tokens = (
            longest,
            self._enough(min(FIRST_TOKENS, capacity.tokens), longest),
        )
        self.kv = allocate(capacity.slots, self.tokens)

    def _enough(self, tokens: int, longest: int) -> int:
        """Return `tokens`, doubled as often as the longest row needs."""
        while tokens < self._max_tokens and longest + max(calls.FEWEST, tokens // 4) > tokens:
            tokens = min(2 * tokens, self._max_tokens)
        return tokens

    def reserve(self, more: int, longest: int) -> None:
        """Makes sure that `more` tokens fit behind the index.

        Tokens in front of the longest active row are dropped first, then the length is doubled as often as needed.

        Args:
          longest: tokens of the longest row that is active or will be.
        """
        if self.index + more <= self.tokens:
            return
        tokens = self._enough(self.tokens, longest)
        self.kv = resize(self.kv, None, np.int32(self.index - longest), tokens)
        self.index, self.tokens = longest, tokens

    def insert(self, prefilled: KVCache, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Writes the tokens that rows have drawn under earlier weights (`insert_rows`) in front of the index."""
        self.kv = insert_rows(self.kv, prefilled, slots, lengths, np.int32(self.index))

    def keep(self, slots: np.ndarray) -> None:
        """Keeps some slots, in the given order; indices count within each shard."""
        self.kv = resize(self.kv, slots, np.int32(0), self.tokens)
