"""The KV cache in pages on the device: `lpo_jax.sampling.pages` decides which sequence has which page.

A pool holds the pages of all shards, shard by shard; page numbers count within the shard. A number past the end stands
for no page: what would be written there is dropped.

Axes: n sequences · R slots · G key/value heads · N head width · S tokens of a sequence · T recent tokens · Z pages of X
tokens · M pages of the longest sequence.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.models.config import ModelConfig
from lpo_jax.models.eight_bits import Stored, zeros
from lpo_jax.parallel import sharding
from lpo_jax.sampling.kv_cache import KVCache

# Per layer `[Z, 2, G, N, X]`: keys and values side by side, so that a page is contiguous, with tokens in the last axis,
# so that heads of 64 take no more memory than they need.
PagePool = list[Stored]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def allocate_pool(config: ModelConfig, dtype: np.dtype, pages: int, page_size: int) -> PagePool:
    """Return a pool of zeros with so many pages in all shards together."""
    shape = pages, 2, config.num_kv_heads, config.head_width, page_size
    constrain = lambda x: sharding.constrain(x, "batch", None, "kv_heads", None, None)  # noqa: E731
    return [jax.tree.map(constrain, zeros(shape, dtype, 3))] * config.num_layers


@functools.partial(jax.jit, donate_argnums=0)
def insert_sequences(
    pool: PagePool, prefilled: KVCache, table: jax.Array, first: jax.Array | None = None
) -> PagePool:
    """Copies the keys and values of prefilled sequences into their pages.

    Args:
      pool: donated.
      prefilled: n sequences.
      table: `[n, M]` int32, pages of each.
      first: `[n]` int32, the first token of each that is copied; None: all are.
    """
    X = page_size(pool)

    def put(pages, keys, values, table, *first):
        S = keys.shape[-1]
        M = min(table.shape[1], math.ceil(S / X))
        both = jnp.stack([keys, jnp.swapaxes(values, 2, 3)], 1)  # [n, 2, G, N, S]
        both = jnp.pad(both, [(0, 0)] * 4 + [(0, M * X if first else -S % X)])
        if first:
            both = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, M * X, 3))(both, *first)
        both = both[..., : M * X].reshape(*both.shape[:4], M, X)
        new = jnp.moveaxis(both, 4, 1).reshape(-1, *pages.shape[1:])
        return pages.at[table[:, :M].reshape(-1)].set(new.astype(pages.dtype), mode="drop")

    rows = (table,) if first is None else (table, first)
    return [_by_part(put, pages, *kv, *rows) for pages, kv in zip(pool, prefilled)]


def store_recent(
    pool: PagePool, recent: KVCache, table: jax.Array, stored: jax.Array, count: jax.Array
) -> PagePool:
    """Moves the tokens that a call of `decode_pages` has drawn into the pages of their rows.

    Args:
      pool: the pool, updated in place where the caller's program allows it.
      recent: R sequences of T tokens.
      table: `[R, M]` int32, pages of each row.
      stored: `[R]` tokens that are in the pages already.
      count: `[R]` new tokens, the first ones of `recent`.
    """
    X, T = page_size(pool), jax.tree.leaves(recent[0][0])[0].shape[-1]
    width = (T + X - 2) // X + 1  # pages that T tokens may touch

    def put(pages, keys, values, table, stored, count):
        at = (stored // X)[:, None] + jnp.arange(width)  # [R, width]: entries of the table
        number = jnp.take_along_axis(table, jnp.minimum(at, table.shape[1] - 1), 1)
        touched = (at < table.shape[1]) & (at * X < (stored + count)[:, None])
        number = jnp.where(touched, number, len(pages))
        token = jnp.arange(width * X) - (stored % X)[:, None]  # [R, width X]: index in `recent`
        # As products with zeros and ones, which are exact, because gathers along the last axis are slow on a TPU.
        wide = keys.dtype if keys.dtype.itemsize > 1 else jnp.bfloat16  # which holds all numbers of 8 bits
        keys, values = keys.astype(wide), values.astype(wide)
        chosen = (token[:, None, :] == jnp.arange(T)[:, None]).astype(wide)  # [R, T, width X]
        moved = functools.partial(jnp.einsum, precision="highest")
        new = jnp.stack([moved("rgnt,rtx->rgnx", keys, chosen), moved("rgtn,rtx->rgnx", values, chosen)], 1)
        new = jnp.moveaxis(new.reshape(*new.shape[:4], width, X), 4, 1)  # [R, width, 2, G, N, X]
        drawn = (token >= 0) & (token < count[:, None])
        drawn = drawn.reshape(-1, width, 1, 1, 1, X)
        old = pages[jnp.minimum(number, len(pages) - 1)]
        new = jnp.where(drawn, new.astype(pages.dtype), old)
        return pages.at[number.reshape(-1)].set(new.reshape(-1, *pages.shape[1:]), mode="drop")

    done: list[Stored] = []
    for pages, kv in zip(pool, recent):
        # One layer after another, because the compiler would keep the pages of all layers in memory at once.
        pages, kv, *before = jax.lax.optimization_barrier((pages, kv, *done[-1:]))
        done[-1:] = before
        done.append(_by_part(put, pages, *kv, table, stored, count))
    return done


def page_size(pool: PagePool) -> int:
    """Return X."""
    return jax.tree.leaves(pool[0])[0].shape[-1]


def _by_part(put: Callable, pages: Stored, keys: Stored, values: Stored, *rows: jax.Array) -> Stored:
    """Applies `put` on each shard, to numbers and scales apart."""
    part = lambda *parts: sharding.on_each_shard(put, *parts, *rows)  # noqa: E731
    return jax.tree.map(part, pages, keys, values)
