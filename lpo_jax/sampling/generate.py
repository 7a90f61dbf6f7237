"""Batched generation: K responses for each of P prompts, on the device, until every row has ended.

The prompt is prefilled once and its keys and values are stored once per prompt; the K rows attend to them.
A host loop runs the jitted decode loop chunk by chunk: storage for the rows' own tokens grows by doubling,
so memory follows the real length; a chunk ends early when all rows have ended. Stop strings are looked for
between chunks. None of this changes a row's tokens: its random numbers are its own (`row_keys`).

Axes: P prompts · K responses · S prompt tokens (padded) · T response tokens · V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lpo_jax.models import decoder
from lpo_jax.models.attention import Causal, Decode
from lpo_jax.models.config import ModelConfig
from lpo_jax.sampling.distribution import Sampling, row_keys

FIRST_STORAGE = 64  # response tokens that key/value storage starts with; it doubles as rows grow
STOP_CHECK = 8  # tokens between two looks for stop strings


@struct.dataclass
class Rows:
    """Where every row stands. All `[P, K]` unless said otherwise."""

    tokens: jax.Array  # [P, K, T] int32; past a row's length: 0
    log_probs: jax.Array  # [P, K, T] float32 of the distribution sampled from; past the length: 0
    lengths: jax.Array  # int32, the end token included
    ended: jax.Array  # bool: met an end token or a stop string
    step: jax.Array  # scalar int32: tokens drawn so far by a row that has not ended


@dataclasses.dataclass(frozen=True)
class Responses:
    """What was sampled, on the host. All `[P, K]` unless said otherwise."""

    tokens: np.ndarray  # [P, K, T] int32, T the longest real length; past a row's length: 0
    log_probs: np.ndarray  # [P, K, T] float32, of the distribution sampled from
    lengths: np.ndarray  # int32, the end token included
    finished: np.ndarray  # bool: ended by itself; False: cut at max_tokens

    @property
    def mask(self) -> np.ndarray:
        """`[P, K, T]`, true at response tokens, the end token included."""
        return np.arange(self.tokens.shape[-1]) < self.lengths[..., None]

    def ids(self, p: int, k: int) -> list[int]:
        """The real token ids of one response."""
        return self.tokens[p, k, : self.lengths[p, k]].tolist()


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples from one model config; compiled programs are shared by equal shapes.

    Attributes:
      eos_ids: every id that ends a response.
      dtype: of activations, weights and key/value storage during sampling.
      decode: ids to text; needed for stop strings only.
    """

    config: ModelConfig
    eos_ids: tuple[int, ...]
    dtype: Any = jnp.float32
    decode: Callable[[list[int]], str] | None = None

    def prepare(self, params: decoder.Params) -> decoder.Params:
        """The weights in decode layout: one dict per layer, in the sampling dtype. Once per round."""
        return _decode_layout(params, jnp.dtype(self.dtype))

    def __call__(
        self,
        weights: decoder.Params,
        prompts: np.ndarray,
        lengths: np.ndarray,
        prompt_ids: np.ndarray,
        *,
        num_responses: int,
        max_tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        step: int = 0,
        stop: Sequence[str] = (),
        active: np.ndarray | None = None,
    ) -> Responses:
        """Samples `num_responses` responses to each prompt.

        Args:
          weights: from `prepare`.
          prompts: `[P, S]` ids, left-aligned; lengths: `[P]` real tokens, at least 1.
          prompt_ids: `[P]` uint32 identities for the random numbers.
          max_tokens: response tokens at most.
          stop: a row ends with the token that completes one of these strings; that token is kept.
          active: `[P]` bool; rows of inactive (padding) prompts are never sampled and have length 0.
        """
        # K is the shape of `keys`; everything that changes without a new program is a traced argument.
        keys = row_keys(
            np.uint32(seed % 2**32), np.uint32(step), np.asarray(prompt_ids, np.uint32), num_responses
        )
        active = np.ones(len(prompts), bool) if active is None else active
        lengths = np.asarray(lengths, np.int32)
        static = (self.config, self.eos_ids, sampling, jnp.dtype(self.dtype))
        rows, prompt_kv = _prefill(
            *static, max_tokens, weights, np.asarray(prompts, np.int32), lengths, keys, active
        )
        storage = min(FIRST_STORAGE, max_tokens)
        own_kv = _empty_storage(self.config, (*rows.lengths.shape, storage), jnp.dtype(self.dtype))
        looked, done = 0, 1  # tokens searched for stop strings, tokens drawn
        while True:
            rows, looked = self._apply_stops(rows, stop, looked), done
            if done >= max_tokens or bool(rows.ended.all()):
                break
            if done >= storage:
                storage = min(2 * storage, max_tokens)
                own_kv = _grow(own_kv, storage)
            limit = min(storage, done + STOP_CHECK) if stop else storage
            rows, own_kv = _decode(*static, weights, rows, prompt_kv, own_kv, lengths, keys, np.int32(limit))
            done = limit
        return _to_host(rows, active)

    def _apply_stops(self, rows: Rows, stop: Sequence[str], looked: int) -> Rows:
        """Ends rows whose text holds a stop string, cutting them behind the token that completed it.

        Rows of more than `looked` tokens have grown since the last look, those an end token has ended included.
        """
        if not stop:
            return rows
        tokens, lengths, ended = (
            np.array(x) for x in jax.device_get((rows.tokens, rows.lengths, rows.ended))
        )
        for p, k in np.argwhere(lengths > looked):
            ids = tokens[p, k, : lengths[p, k]].tolist()
            if any(s in self.decode(ids) for s in stop):
                lengths[p, k] = _completes(self.decode, ids, stop)
                ended[p, k] = True
        keep = np.arange(tokens.shape[-1]) < lengths[..., None]
        return rows.replace(
            tokens=jnp.where(keep, rows.tokens, 0),
            log_probs=jnp.where(keep, rows.log_probs, 0.0),
            lengths=jnp.asarray(lengths),
            ended=jnp.asarray(ended),
        )


def _completes(decode, ids: list[int], stop: Sequence[str]) -> int:
    """The fewest tokens whose text holds a stop string (only the last few chunks can hold the first one)."""
    n = max(1, len(ids) - 2 * STOP_CHECK)
    while not any(s in decode(ids[:n]) for s in stop):
        n += 1
    while n > 1 and any(s in decode(ids[: n - 1]) for s in stop):
        n -= 1
    return n


@functools.partial(jax.jit, static_argnums=1)
def _decode_layout(params, dtype):
    return jax.tree.map(lambda p: p.astype(dtype), decoder.unstack_layers(params))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_storage(config, shape, dtype):
    """Own keys and values of every layer: a list of pairs `[P, K, T, G, N]`."""
    zeros = lambda: jnp.zeros((*shape, config.num_kv_heads, config.head_width), dtype)  # noqa: E731
    return [(zeros(), zeros()) for _ in range(config.num_layers)]


@functools.partial(jax.jit, static_argnums=1)
def _grow(own_kv, storage):
    room = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, storage - x.shape[2]), (0, 0), (0, 0)])  # noqa: E731
    return jax.tree.map(room, own_kv)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _prefill(config, eos_ids, sampling, dtype, max_tokens, weights, prompts, lengths, keys, active):
    """Prompt keys and values, once per prompt, and the first token of every row."""
    P, S = prompts.shape
    K = keys.shape[1]
    valid = jnp.arange(S) < lengths[:, None]
    positions = jnp.broadcast_to(jnp.arange(S), (P, S))
    context = Causal(valid, positions, window=config.sliding_window, keep=True)
    no_kv = [None] * config.num_layers
    hidden, prompt_kv = decoder.forward(config, weights, prompts, positions, context, no_kv, dtype=dtype)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [P, D]
    logits = decoder.project(last, decoder.unembedding(weights))
    rows = Rows(
        tokens=jnp.zeros((P, K, max_tokens), jnp.int32),
        log_probs=jnp.zeros((P, K, max_tokens), jnp.float32),
        lengths=jnp.zeros((P, K), jnp.int32),
        ended=jnp.broadcast_to(~active[:, None], (P, K)),
        step=jnp.int32(0),
    )
    return _draw(eos_ids, sampling, rows, jnp.repeat(logits, K, axis=0), keys), prompt_kv


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5, 7))
def _decode(config, eos_ids, sampling, dtype, weights, rows, prompt_kv, own_kv, lengths, keys, limit):
    """Draws tokens until `limit` of them are drawn or every row has ended."""
    P, K, _ = rows.tokens.shape

    def unfinished(state):
        rows, _ = state
        return (rows.step < limit) & ~rows.ended.all()

    def one_token(state):
        rows, own_kv = state
        at = rows.step - 1  # the last token drawn is fed in, and its keys and values stored at its own index
        token = jax.lax.dynamic_index_in_dim(rows.tokens, at, axis=2, keepdims=False)  # [P, K]
        context = Decode(lengths, at, window=config.sliding_window)
        positions = jnp.broadcast_to((lengths + at)[:, None], (P, K))
        kv = [(*prompt, *own) for prompt, own in zip(prompt_kv, own_kv)]
        hidden, own_kv = decoder.forward(config, weights, token, positions, context, kv, dtype=dtype)
        logits = decoder.project(hidden.reshape(P * K, -1), decoder.unembedding(weights))
        return _draw(eos_ids, sampling, rows, logits, keys), own_kv

    return jax.lax.while_loop(unfinished, one_token, (rows, own_kv))


def _draw(eos_ids, sampling, rows: Rows, logits: jax.Array, keys: jax.Array) -> Rows:
    """Appends one token to every row that has not ended. `logits [P K, V]`, `keys [P, K]`."""
    P, K, _ = rows.tokens.shape
    with jax.named_scope("draw"):
        at_position = jax.vmap(lambda key: jax.random.fold_in(key, rows.step))(keys.reshape(-1))
        token, log_prob = sampling.draw(at_position, logits)
    going = ~rows.ended
    token = jnp.where(going, token.reshape(P, K), 0)
    log_prob = jnp.where(going, log_prob.reshape(P, K), 0.0)
    at = (0, 0, rows.step)
    return rows.replace(
        tokens=jax.lax.dynamic_update_slice(rows.tokens, token[..., None], at),
        log_probs=jax.lax.dynamic_update_slice(rows.log_probs, log_prob[..., None], at),
        lengths=rows.lengths + going,
        ended=rows.ended | jnp.isin(token, jnp.array(eos_ids, jnp.int32)) & going,
        step=rows.step + 1,
    )


def _to_host(rows: Rows, active: np.ndarray) -> Responses:
    tokens, log_probs, lengths, ended = jax.device_get(
        (rows.tokens, rows.log_probs, rows.lengths, rows.ended)
    )
    T = max(1, int(lengths.max()))
    return Responses(tokens[..., :T], log_probs[..., :T], lengths, ended & np.asarray(active)[:, None])
