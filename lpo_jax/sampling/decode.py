"""The decode programs: they draw several tokens for every slot in one call (`lpo_jax.sampling.calls`).

`decode` has a KV cache in which each slot has a row, `decode_pages` one in pages; all else is the same.

Prefill computes keys and values only and draws no token. A row begins by feeding the last token of its prompt once
more, as the first one of its own, so that every token of every row is drawn by the same program, whichever rows share
the batch and whenever they entered it. Between calls only the KV caches stay on the device; the state of a row (its
last token, how many it has drawn, its random key) is a few numbers that the host passes to each call.

Axes: R slots · U prompts in the cache · C slots that share a prompt · M pages of the longest row · V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lpo_jax.models import decoder
from lpo_jax.models.attention import Context, Decode, DecodePages
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.eight_bits import KVDtype, stored_dtype
from lpo_jax.models.kernels.choice import Attention
from lpo_jax.models.placement import constrain_params
from lpo_jax.models.quantize import quantise_layer
from lpo_jax.models.rotary import rope_table
from lpo_jax.parallel import sharding
from lpo_jax.sampling import calls
from lpo_jax.sampling.distribution import Sampling
from lpo_jax.sampling.kv_cache import KVCache, allocate
from lpo_jax.sampling.page_pool import PagePool, store_recent


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """The static argument of `decode`: a program is compiled for each value of it, and for each set of shapes.

    Attributes:
      eos_ids: every token id that ends a response.
      dtype: of activations.
      kv_dtype: of the KV cache.
      call_tokens: the most tokens that a call draws for each slot.
    """

    config: ModelConfig
    eos_ids: tuple[int, ...]
    distribution: Sampling
    dtype: np.dtype
    attention: Attention = "auto"
    kv_dtype: KVDtype = "compute"
    call_tokens: int = calls.FEWEST

    @property
    def stored(self) -> np.dtype:
        """The type of the numbers in the KV cache."""
        return stored_dtype(self.kv_dtype, self.dtype)


class DecodeState(struct.PyTreeNode):
    """The rows in the slots before a call of `decode`. All arrays are `[R]` unless stated otherwise.

    Attributes:
      token: int32, the last token; before the first draw the last one of the prompt.
      start: int32, position of the prompt's last token.
      drawn: int32, tokens drawn so far.
      budget: int32, maximum number of tokens to draw.
      active: bool, whether the slot holds a row that has met no end token, no stop string and not its budget.
      keys: `[R, 2]` uint32, data of `row_keys`.
      members: `[U, C]` int32, the slots that share each prompt, as in `attention.Decode`. None: R / U slots each,
        contiguous by prompt.
      member_index: `[R]` int32, where each slot is in the flattened `members`; None together with `members`.
    """

    token: jax.Array
    start: jax.Array
    drawn: jax.Array
    budget: jax.Array
    active: jax.Array
    keys: jax.Array
    members: jax.Array | None = None
    member_index: jax.Array | None = None


class DecodeOutput(struct.PyTreeNode):
    """The result of a call of `decode`.

    Attributes:
      tokens: `[R, call_tokens]` int32; 0 in slots that are not active.
      log_probs: `[R, call_tokens]` float32, under the distribution that was sampled from; 0 in slots that are not
        active.
      entropies: `[R, call_tokens]` float32, of that distribution at each token; 0 in slots that are not active.
      drawn: `[R]` int32, tokens drawn in all, those of earlier calls included.
      active: `[R]` bool.
      steps: int32 scalar, tokens that a slot could have drawn in this call.
    """

    tokens: jax.Array
    log_probs: jax.Array
    entropies: jax.Array
    drawn: jax.Array
    active: jax.Array
    steps: jax.Array

    def append(
        self, drawn: tuple[jax.Array, ...], eos_ids: tuple[int, ...], budget: jax.Array
    ) -> "DecodeOutput":
        """Adds a token, its log-prob and its entropy, `[R]` each, to the active slots. Deactivates finished rows."""
        count = self.drawn + self.active
        ended = jnp.isin(drawn[0], jnp.array(eos_ids, jnp.int32)) | (count >= budget)
        write = lambda kept, x: jax.lax.dynamic_update_slice(kept, x[:, None], (0, self.steps))  # noqa: E731
        return DecodeOutput(
            tokens=write(self.tokens, drawn[0]),
            log_probs=write(self.log_probs, drawn[1]),
            entropies=write(self.entropies, drawn[2]),
            drawn=count,
            active=self.active & ~ended,
            steps=self.steps + 1,
        )


def decode_layout(
    config: ModelConfig, params: decoder.Params, dtype: np.dtype, int8: bool = False
) -> decoder.Params:
    """Return the weights for decoding: one dict per layer, in `dtype`, sharded for the current mesh.

    Layers are converted one by one, so that no third copy exists beside the old and the new weights.

    Args:
      params: the parameter tree of `lpo_jax.models.decoder`, layers stacked.
      int8: quantise matrices to 8 bits.
    """
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = range(config.num_layers)
    made = {i: decode_layer(config, params["layers"], np.int32(i), dtype, int8) for i in layers}
    return {**_cast(config, rest, dtype), "layers": made}


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def decode_layer(config, stacked, layer, dtype, int8=False):
    """Converts one layer for `decode_layout`."""
    weights = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False), stacked)
    weights = _cast(config, {"layers": {0: weights}}, dtype)["layers"][0]
    return quantise_layer(weights) if int8 else weights


@functools.partial(jax.jit, static_argnums=(0, 2))
def _cast(config, weights, dtype):
    # On a mesh, weights move from the training layout here. The cast comes first because it halves the bytes to move.
    return constrain_params(config, jax.tree.map(lambda p: p.astype(dtype), weights))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def decode(
    settings: DecodeSettings,
    weights: decoder.Params,
    state: DecodeState,
    prompt_lengths: jax.Array,
    prompt_kv: KVCache,
    response_kv: KVCache,
    index: jax.Array,
    limit: jax.Array,
    min_active: jax.Array,
) -> tuple[DecodeOutput, KVCache]:
    """Draws up to `limit` tokens for each slot, and stops early when fewer than `min_active` slots are active.

    Args:
      weights: from `decode_layout`.
      prompt_lengths: `[U]` tokens of the prompts in the cache.
      response_kv: donated. Tokens are written from `index` on, where `limit` of them must fit.
      index: scalar, where the first token is written in every sequence of `response_kv`.
      limit: scalar, at most `settings.call_tokens`.
      min_active: scalar, at least 1.

    Returns:
      What was drawn, and the updated response cache.
    """

    def context(steps, active, positions):
        return Decode(
            # The last token of the prompt is stored as the first one of the row.
            prompt_lengths - 1,
            positions,
            # A slot that is not active attends to its new token alone.
            jnp.where(active, index - state.drawn, index + steps),
            index + steps,
            state.members,
            state.member_index,
        )

    def layers(own):
        return [(*prompt, *kv) for prompt, kv in zip(prompt_kv, own)]

    return _draw_tokens(settings, weights, state, context, layers, response_kv, limit, min_active)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=6)
def decode_pages(
    settings: DecodeSettings,
    weights: decoder.Params,
    state: DecodeState,
    prompt_lengths: jax.Array,
    prompt_table: jax.Array,
    table: jax.Array,
    pool: PagePool,
    limit: jax.Array,
    min_active: jax.Array,
) -> tuple[DecodeOutput, PagePool]:
    """Draws up to `limit` tokens for each slot, as `decode` does, with a KV cache in pages.

    Args:
      state: with `members`.
      prompt_table: `[U, ...]` int32, pages of each prompt.
      table: `[R, M]` int32, pages of each slot's row, for the tokens that it may draw too; a number past the end of the
        pool where it has none.
      pool: donated.

    Returns:
      What was drawn, and the pool with its keys and values.
    """
    # While the loop runs, the pool is only read. What is drawn is kept beside it and moves into its pages at the end.
    recent = allocate(settings.config, settings.stored, len(state.token), settings.call_tokens)
    stored = jnp.where(state.active, state.drawn, 0)  # kernels read nothing for a slot that is not active

    def context(steps, active, positions):
        return DecodePages(
            prompt_lengths - 1,
            prompt_table,
            stored,
            table,
            steps,
            positions,
            state.members,
            state.member_index,
            settings.attention,
        )

    def layers(own):
        return [(pages, *kv) for pages, kv in zip(pool, own)]

    out, recent = _draw_tokens(settings, weights, state, context, layers, recent, limit, min_active)
    return out, store_recent(pool, recent, table, stored, out.drawn - state.drawn)


def _draw_tokens(
    settings: DecodeSettings,
    weights: decoder.Params,
    state: DecodeState,
    context: Callable[[jax.Array, jax.Array, jax.Array], Context],
    layers: Callable[[KVCache], list],
    own_kv: KVCache,
    limit: jax.Array,
    min_active: jax.Array,
) -> tuple[DecodeOutput, KVCache]:
    """The loop of `decode` and `decode_pages`.

    Args:
      context: of the attention, from the steps so far, the active slots `[R]` and the positions `[R]` of their tokens.
      layers: from the keys and values that the loop writes, what attention reads in each layer.
      own_kv: the keys and values that the loop writes.
    """
    config, R = settings.config, state.token.shape[0]
    keys = jax.random.wrap_key_data(state.keys)
    # All positions of this call: inside the loop every layer would compute the same sines again.
    ahead = state.start + state.drawn + jnp.arange(settings.call_tokens)[:, None]  # [call_tokens, R]
    rope = rope_table(config, ahead[..., None])
    made = R, settings.call_tokens
    zeros = lambda dtype: sharding.constrain(jnp.zeros(made, dtype), "batch", None)  # noqa: E731
    empty = DecodeOutput(
        tokens=zeros(jnp.int32),
        log_probs=zeros(jnp.float32),
        entropies=zeros(jnp.float32),
        drawn=state.drawn,
        active=state.active,
        steps=jnp.int32(0),
    )

    def unfinished(carry):
        out, _, _ = carry
        return (out.steps < limit) & (out.active.sum() >= min_active)

    def one_token(carry):
        out, token, own_kv = carry
        now = tuple(x[out.steps] for x in rope)
        hidden, own_kv = decoder.forward(
            config,
            weights,
            token[:, None],
            now,
            context(out.steps, out.active, ahead[out.steps]),
            layers(own_kv),
            dtype=settings.dtype,
        )
        logits = decoder.project(hidden[:, 0], decoder.unembedding(weights))
        if config.never_sampled:
            logits = logits.at[:, np.array(config.never_sampled)].set(-jnp.inf)
        with jax.named_scope("draw"):
            folded = jax.vmap(jax.random.fold_in)(keys, out.drawn)
            drawn = settings.distribution.draw(folded, logits)
        drawn = tuple(jnp.where(out.active, x, 0) for x in drawn)
        return out.append(drawn, settings.eos_ids, state.budget), drawn[0], own_kv

    out, _, own_kv = jax.lax.while_loop(unfinished, one_token, (empty, state.token, own_kv))
    # Replicated on every device, so that every host can read it.
    return jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), out), own_kv
