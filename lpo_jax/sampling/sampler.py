"""Batched sampling: K responses to each of P prompts, decoded on the device until every row is finished.

Each prompt is prefilled once, its keys and values are stored once, and its K rows attend to them. Rows share the device
by continuous batching (`lpo_jax.sampling.batching`). None of this changes the tokens of a row, because its random
numbers are its own (`row_keys`).

Axes: P prompts · K responses · S prompt tokens (padded) · T response tokens · V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lpo_jax.models import decoder
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.eight_bits import KVDtype
from lpo_jax.models.kernels.choice import Attention, uses_kernels
from lpo_jax.models.prompt_images import lay_out
from lpo_jax.parallel import sharding
from lpo_jax.sampling import calls, kv_cache
from lpo_jax.sampling.batching import ContinuousBatcher
from lpo_jax.sampling.decode import DecodeSettings, decode_layout
from lpo_jax.sampling.distribution import row_keys
from lpo_jax.sampling.paging import PagedBatcher
from lpo_jax.sampling.request import PromptBatch, SampleRequest
from lpo_jax.sampling.responses import Ahead, Responses
from lpo_jax.sampling.stop_strings import stop_finder


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples from a model. Samplers of equal settings share their compiled programs.

    Attributes:
      config: of the model.
      eos_ids: every token id that ends a response.
      dtype: of activations and weights during sampling.
      decode: token ids to text; needed for stop strings only.
      mesh: `sharding.decode_mesh` of the mesh that the parameters are on; None: one device.
      max_rows: limit on the rows that all devices decode at once; the others are queued. 0: no limit.
      attention: kernels or plain matrix products (`lpo_jax.models.kernels.choice`).
      kv_tokens: with kernels, tokens of prompts and responses that the KV caches of all devices hold together; 0: as
        many as `max_rows` rows of full length need. Plain attention has a cache that grows.
      kv_dtype: of the KV caches; compute: `dtype`.
    """

    config: ModelConfig
    eos_ids: tuple[int, ...]
    dtype: DTypeLike = jnp.float32
    decode: Callable[[list[int]], str] | None = None
    mesh: Mesh | None = None
    max_rows: int = 0
    attention: Attention = "auto"
    kv_tokens: int = 0
    kv_dtype: KVDtype = "compute"

    def prepare(self, params: decoder.Params, int8: bool = False) -> decoder.Params:
        """Return the weights in decode layout: one dict per layer, in the sampling dtype. Call it once per round.

        Args:
          int8: quantise matrices to 8 bits (`lpo_jax.models.quantize`).
        """
        with sharding.using(self.mesh):
            return decode_layout(self.config, params, jnp.dtype(self.dtype), int8)

    def __call__(
        self,
        weights: decoder.Params,
        prompts: PromptBatch,
        request: SampleRequest,
        *,
        budgets: np.ndarray | None = None,
        at_least: int = 0,
        on_finished: Callable[[int, int, list[int]], None] | None = None,
        ahead: Ahead | None = None,
    ) -> Responses:
        """Samples `request.num_responses` responses to each prompt.

        Args:
          weights: from `prepare`.
          budgets: `[P, K]` maximum tokens of each response, if that is fewer than `request.max_tokens`. A response with
            budget 0 is not sampled and has length 0.
          at_least: smaller batches are padded with empty prompts to this number of prompts, so that a last, smaller
            batch needs no program of its own. Empty prompts are not sampled and not returned.
          on_finished: called with p, k and the token ids of each finished response, in any order, while the device
            continues with other responses; with `ahead` only for the prompts of the first round.
          ahead: prompts of later steps among the prompts, and the responses so far. None: there are none.

        Raises:
          UserError: one of the stop strings is empty, or the KV cache is too small for the longest row.
        """
        P, K, limit = len(prompts.tokens), request.num_responses, request.max_tokens
        ahead = ahead or Ahead(1, np.full(P, request.step, np.uint32), Responses.empty(P, K, limit))
        budgets = np.full((P, K), limit) if budgets is None else np.minimum(budgets, limit)
        with sharding.using(self.mesh):
            shards = sharding.batch_shards()
            index = _shard_order(P, ahead.rounds, at_least, shards)
            of_batch = functools.partial(_take, index)
            pictures, images = prompts.images, None
            prompts = PromptBatch(
                of_batch(np.asarray(prompts.tokens, np.int32)),
                of_batch(np.asarray(prompts.lengths, np.int32), 1),
                of_batch(np.asarray(prompts.ids, np.uint32)),
            )
            if any(pictures):
                shown = [pictures[p] if p >= 0 else () for p in index]
                mask = np.arange(prompts.tokens.shape[1]) < prompts.lengths[:, None]
                images = lay_out(self.config, prompts.tokens, mask, shown, shards)
            # K is the shape of `keys`; everything that changes without a new program is a traced argument.
            steps = of_batch(np.asarray(ahead.steps, np.uint32))
            keys = jax.random.key_data(row_keys(np.uint32(request.seed % 2**32), steps, prompts.ids, K))
            rows = len(index) // ahead.rounds * K  # of a round: later ones take free slots only
            kernels = uses_kernels(self.attention)
            kind = functools.partial(PagedBatcher, kv_tokens=self.kv_tokens) if kernels else ContinuousBatcher
            slots = min(self.max_rows or rows, rows)
            batcher = kind(
                self._settings(request, weights, slots),
                weights,
                prompts,
                np.asarray(keys),
                of_batch(budgets),
                Responses(*map(of_batch, vars(ahead.started.resized(limit)).values())),
                request.step,
                slots,
                stop_finder(self.decode, request.stop),
                on_finished and (lambda p, *row: on_finished(int(index[p]), *row)),
                required=(index >= 0) & (index < P // ahead.rounds),
                images=images,
            )
            found = batcher.run()
        return found.take(np.argsort(index, kind="stable")[-P:]).trimmed()

    def _settings(self, request: SampleRequest, weights: decoder.Params, rows: int) -> DecodeSettings:
        """Return the settings of `decode` for so many rows at once, on the current mesh."""
        settings = DecodeSettings(
            self.config,
            self.eos_ids,
            request.distribution,
            jnp.dtype(self.dtype),
            self.attention,
            self.kv_dtype,
        )
        local = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize  # noqa: E731
        recent = 0.0
        if uses_kernels(self.attention):
            parts = 1 if self.mesh is None else self.mesh.shape["tensor"]
            token = kv_cache.token_bytes(self.config, settings.stored)
            recent = rows / sharding.batch_shards() * token / parts
        tokens = calls.planned_call_tokens(
            request.max_tokens, rows, sum(map(local, jax.tree.leaves(weights))), recent, jax.default_backend()
        )
        return dataclasses.replace(settings, call_tokens=tokens)


def _shard_order(P: int, rounds: int, at_least: int, shards: int) -> np.ndarray:
    """Return the prompt at each place of a batch, -1 for an empty one.

    Every shard gets the same number of prompts of each round, those of the first round first.
    """
    size = max(P // rounds, at_least)
    size += -size % shards
    index = np.full((rounds, size), -1)
    index[:, : P // rounds] = np.arange(P).reshape(rounds, -1)
    return index.reshape(rounds, shards, -1).swapaxes(0, 1).ravel()


def _take(index: np.ndarray, x: np.ndarray, fill: int = 0) -> np.ndarray:
    """Return `x[index]`, and `fill` where the index is negative."""
    out = x[index]
    out[index < 0] = fill
    return out
