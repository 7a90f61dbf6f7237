"""The device programs of sampling: weights in decode layout, prompts prefilled, tokens drawn.

Prompts are prefilled once; what is kept is their keys and values, and no token is drawn there: a row begins by
feeding its prompt's last token once more, as its own first. So every token of every row is drawn by one program,
`decode`, whoever shares the batch and since when. What a row is (its last token, how many it has drawn, its random
key) is a few numbers that the host hands in with each call; on the device stay only keys and values.

Axes: R rows · U prompts in storage · C rows of a prompt · S prompt tokens · T tokens of own storage · L layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lpo_jax.models import decoder
from lpo_jax.models.attention import Attention, Decode
from lpo_jax.models.placement import constrain_params
from lpo_jax.models.quantize import quantise_layer
from lpo_jax.parallel import sharding
from lpo_jax.sampling.kv_cache import CHUNK, Storage


@struct.dataclass
class Rows:
    """What the device must know of its rows. All `[R]` unless said otherwise."""

    token: jax.Array  # int32, drawn last; at first the prompt's last one
    start: jax.Array  # int32, position of the prompt's last token
    drawn: jax.Array  # int32, tokens drawn so far
    budget: jax.Array  # int32, tokens to draw at most
    going: jax.Array  # bool: has met neither an end token, nor a stop string, nor its budget
    keys: jax.Array  # [R, 2] uint32, the data of `row_keys`
    # Which rows share a prompt, as in `attention.Decode`, on a mesh by each shard's own indices; None: R / U rows each,
    # prompt by prompt.
    members: jax.Array | None = None  # [U, C] int32
    places: jax.Array | None = None  # [R] int32


@struct.dataclass
class Drawn:
    """What a call of `decode` did."""

    tokens: jax.Array  # [R, CHUNK] int32; 0 where a row had ended
    log_probs: jax.Array  # [R, CHUNK] float32 of the distribution sampled from; 0 where a row had ended
    drawn: jax.Array  # [R] int32, tokens drawn by now in all
    going: jax.Array  # [R] bool
    steps: jax.Array  # int32 scalar: tokens that each row could have drawn


def decode_layout(config, params, dtype, int8=False):
    """One dict of weights per layer, in the sampling dtype (matrices in 8 bits with `int8`), where
    the current mesh wants them. Layer by layer: beside old and new weights no third copy is ever there."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = range(config.num_layers)
    made = {i: decode_layer(config, params["layers"], np.int32(i), dtype, int8) for i in layers}
    return {**_cast(config, rest, dtype), "layers": made}


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def decode_layer(config, stacked, layer, dtype, int8=False):
    """One layer of `decode_layout`."""
    weights = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False), stacked)
    weights = _cast(config, {"layers": {0: weights}}, dtype)["layers"][0]
    return quantise_layer(weights) if int8 else weights


@functools.partial(jax.jit, static_argnums=(0, 2))
def _cast(config, weights, dtype):
    # On a mesh this is where weights move from the training layout: cast first, so that half the bytes travel.
    return constrain_params(config, jax.tree.map(lambda p: p.astype(dtype), weights))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 12), donate_argnums=8)
def decode(
    config,
    eos_ids,
    sampling,
    dtype,
    weights,
    rows: Rows,
    prompt_lengths,
    prompt_kv: Storage,
    own_kv: Storage,
    at,
    limit,
    fewest,
    attention: Attention = "auto",
) -> tuple[Drawn, Storage]:
    """Draws up to `limit` tokens for each row; fewer when few rows go on.

    Args:
      prompt_lengths: `[U]` tokens of the stored prompts.
      at: index in own storage of the first token fed in; there is room for `limit` from there.
      limit: at most CHUNK.
      fewest: rows that must go on, at least 1; with fewer of them the host can do better.
    """
    R = rows.token.shape[0]
    keys = jax.random.wrap_key_data(rows.keys)
    # All positions of this call: inside the loop every layer would compute the same sines again.
    ahead = rows.start + rows.drawn + jnp.arange(CHUNK)[:, None]  # [CHUNK, R]
    rope = decoder.rope_table(config, ahead[..., None])
    empty = Drawn(
        tokens=sharding.constrain(jnp.zeros((R, CHUNK), jnp.int32), "batch", None),
        log_probs=sharding.constrain(jnp.zeros((R, CHUNK), jnp.float32), "batch", None),
        drawn=rows.drawn,
        going=rows.going,
        steps=jnp.int32(0),
    )

    def unfinished(state):
        done, _, _ = state
        return (done.steps < limit) & (done.going.sum() >= fewest)

    def one_token(state):
        done, token, own_kv = state
        context = Decode(
            # The prompt's last token is a row's own first.
            prompt_lengths - 1,
            ahead[done.steps],
            # Nobody needs what a row that has ended attends to: itself, so that kernels read nothing for it.
            jnp.where(done.going, at - rows.drawn, at + done.steps),
            at + done.steps,
            rows.members,
            rows.places,
            attention,
        )
        kv = [(*prompt, *own) for prompt, own in zip(prompt_kv, own_kv)]
        hidden, own_kv = decoder.forward(
            config, weights, token[:, None], tuple(x[done.steps] for x in rope), context, kv, dtype=dtype
        )
        logits = decoder.project(hidden[:, 0], decoder.unembedding(weights))
        with jax.named_scope("draw"):
            token, log_prob = sampling.draw(jax.vmap(jax.random.fold_in)(keys, done.drawn), logits)
        token = jnp.where(done.going, token, 0)
        log_prob = jnp.where(done.going, log_prob, 0.0)
        drawn = done.drawn + done.going
        ended = jnp.isin(token, jnp.array(eos_ids, jnp.int32)) | (drawn >= rows.budget)
        index = (0, done.steps)
        done = Drawn(
            tokens=jax.lax.dynamic_update_slice(done.tokens, token[:, None], index),
            log_probs=jax.lax.dynamic_update_slice(done.log_probs, log_prob[:, None], index),
            drawn=drawn,
            going=done.going & ~ended,
            steps=done.steps + 1,
        )
        return done, token, own_kv

    done, _, own_kv = jax.lax.while_loop(unfinished, one_token, (empty, rows.token, own_kv))
    # Whole on every device, so that every host can read it.
    return jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), done), own_kv
