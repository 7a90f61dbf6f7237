"""Keys and values on the device: how they lie, and how they are made, moved and filled.

Axes: R rows · U prompts in storage · S prompt tokens · T tokens of own storage · L layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lpo_jax.models import decoder
from lpo_jax.models.attention import Attention, Causal
from lpo_jax.parallel import sharding

CHUNK = 16  # tokens that `decode` draws at most before the host looks: then rows leave and arrive
FIRST_STORAGE = 64  # tokens that own storage starts with; it doubles as rows grow

Storage = list[tuple[jax.Array, jax.Array]]  # per layer; the layout is that of `attention.Decode`


@dataclasses.dataclass(frozen=True)
class Room:
    """What is kept on the device, on all shards together.

    Attributes:
      rows: places (R); prompts: in storage (U); batch: prompts that are prefilled at once; tokens: own storage at most.
      waits: whether rows have to wait for places.
    """

    rows: int
    prompts: int
    batch: int
    tokens: int
    waits: bool

    @classmethod
    def of(cls, P: int, K: int, max_tokens: int, max_rows: int, shards: int) -> "Room":
        """For P prompts, as many on every shard; `max_rows` on all shards together, 0: no limit."""
        if not 0 < max_rows < P * K:
            return cls(P * K, P, P, max_tokens, False)
        rows = max(1, max_rows // shards)
        batch = max(1, rows // K)  # prompts that fill a shard
        # Rows that come at different times lie behind each other's beginnings: room for a quarter more, so that
        # dropping what nobody needs is rare.
        tokens = max_tokens + max(CHUNK, max_tokens // 4)
        return cls(shards * rows, shards * min(P // shards, 4 * batch), shards * batch, tokens, True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_storage(config, shape, dtype) -> Storage:
    """Zeros for `shape = (sequences, tokens)`."""
    B, T = shape
    G, N = config.num_kv_heads, config.head_width
    keys = sharding.constrain(jnp.zeros((B, G, N, T), dtype), "batch", "kv_heads", None, None)
    values = sharding.constrain(jnp.zeros((B, G, T, N), dtype), "batch", "kv_heads", None, None)
    return [(keys, values) for _ in range(config.num_layers)]


def move(storage: Storage, rows, shift: int, tokens: int) -> Storage:
    """Storage of some rows (None: all; each shard by its own indices), `shift` tokens dropped in front and room for
    `tokens` in all.

    Layer by layer, each freed before the next: there are never two copies of all.
    """
    for layer, (keys, values) in enumerate(storage):
        storage[layer] = None
        storage[layer] = _move(keys, rows, shift, tokens, 3), _move(values, rows, shift, tokens, 2)
    return storage


@functools.partial(jax.jit, static_argnums=(3, 4))
def _move(x, rows, shift, tokens, axis):
    x = x if rows is None else sharding.on_each_shard(lambda x, rows: x[rows], x, rows)
    x = jnp.roll(x, -shift, axis)[(slice(None),) * axis + (slice(tokens),)]
    return jnp.pad(x, [(0, tokens - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.jit, donate_argnums=0)
def put_prompts(storage: Storage, prefilled: Storage, source, place) -> Storage:
    """`storage` with a prompt of `prefilled` for each shard: `source` says which, `place` where; both `[shards]`, and
    past the end where there is none."""
    put = lambda x, new, source, place: x.at[place].set(new[source], mode="drop")  # noqa: E731
    return jax.tree.map(lambda x, new: sharding.on_each_shard(put, x, new, source, place), storage, prefilled)


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def prefill(config, dtype, weights, prompts, lengths, attention: Attention = "auto") -> Storage:
    """Keys and values of `prompts [U, S]`."""
    prompts = sharding.constrain(prompts, "batch", None)
    U, S = prompts.shape
    valid = jnp.arange(S) < lengths[:, None]
    positions = jnp.broadcast_to(jnp.arange(S), (U, S))
    context = Causal(valid, positions, keep=True, attention=attention)
    no_kv = [None] * config.num_layers
    _, kept = decoder.forward(config, weights, prompts, positions, context, no_kv, dtype=dtype)
    return [(jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2)) for k, v in kept]
