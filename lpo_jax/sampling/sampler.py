"""Batched sampling: K responses to each of P prompts, decoded on the device until every row is finished.

Each prompt is prefilled once, its keys and values are stored once, and its K rows attend to them. Rows share the device
by continuous batching (`lpo_jax.sampling.batching`). None of this changes the tokens of a row, because its random
numbers are its own (`row_keys`).

Axes: P prompts · K responses · S prompt tokens (padded) · T response tokens · V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lpo_jax.models import decoder
from lpo_jax.models.attention import Attention
from lpo_jax.models.config import ModelConfig
from lpo_jax.parallel import sharding
from lpo_jax.sampling.batching import ContinuousBatcher
from lpo_jax.sampling.decode import DecodeSettings, decode_layout
from lpo_jax.sampling.distribution import row_keys
from lpo_jax.sampling.padding import pad_rows
from lpo_jax.sampling.request import PromptBatch, SampleRequest
from lpo_jax.sampling.stop_strings import stop_finder


@dataclasses.dataclass(frozen=True)
class Responses:
    """Sampled responses, on the host.

    Attributes:
      tokens: `[P, K, T]` int32, T the length of the longest response; 0 behind a response's end.
      log_probs: `[P, K, T]` float32, under the distribution that was sampled from; 0 behind a response's end.
      entropies: `[P, K, T]` float32, of that distribution at each token, in nats; 0 behind a response's end.
      lengths: `[P, K]` int32, the end token included.
      finished: `[P, K]` bool, true if an end token or a stop string ended the response, false if its budget did.
      row_steps: `[P, K]` float32, decode steps that the device spent on this response, its share of the steps of idle
        slots included.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    row_steps: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """`[P, K, T]` bool, true at response tokens, the end token included."""
        return np.arange(self.tokens.shape[-1]) < self.lengths[..., None]

    def take(self, prompts: np.ndarray) -> "Responses":
        """Returns the responses to some prompts, in the given order."""
        return Responses(*(x[prompts] for x in vars(self).values()))

    def ids(self, p: int, k: int) -> list[int]:
        """Returns the token ids of one response, without padding."""
        return self.tokens[p, k, : self.lengths[p, k]].tolist()


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples from a model. Samplers of equal settings share their compiled programs.

    Attributes:
      config: of the model.
      eos_ids: every token id that ends a response.
      dtype: of activations, weights and KV caches during sampling.
      decode: token ids to text; needed for stop strings only.
      mesh: `sharding.decode_mesh` of the mesh that the parameters are on; None: one device.
      max_rows: limit on the rows that all devices decode at once; the others are queued. 0: no limit.
      attention: kernels for TPUs or plain matrix products (`lpo_jax.models.attention`).
    """

    config: ModelConfig
    eos_ids: tuple[int, ...]
    dtype: DTypeLike = jnp.float32
    decode: Callable[[list[int]], str] | None = None
    mesh: Mesh | None = None
    max_rows: int = 0
    attention: Attention = "auto"

    def prepare(self, params: decoder.Params, int8: bool = False) -> decoder.Params:
        """Returns the weights in decode layout: one dict per layer, in the sampling dtype. Call it once per round.

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
    ) -> Responses:
        """Samples `request.num_responses` responses to each prompt.

        Args:
          weights: from `prepare`.
          budgets: `[P, K]` maximum tokens of each response, if that is fewer than `request.max_tokens`. A response with
            budget 0 is not sampled and has length 0.
          at_least: smaller batches are padded with empty prompts to this number of prompts, so that a last, smaller
            batch needs no program of its own. Empty prompts are not sampled and not returned.
          on_finished: called with p, k and the token ids of each finished response, in any order, while the device
            continues with other responses.

        Raises:
          UserError: one of the stop strings is empty.
        """
        P, K = len(prompts.tokens), request.num_responses
        limit = request.max_tokens
        budgets = np.full((P, K), limit) if budgets is None else np.minimum(budgets, limit)
        with sharding.using(self.mesh):
            # Every device gets the same number of prompts.
            size = max(P, at_least)
            more = size + -size % sharding.batch_shards() - P
            prompts = PromptBatch(
                pad_rows(np.asarray(prompts.tokens, np.int32), more),
                pad_rows(np.asarray(prompts.lengths, np.int32), more, 1),
                pad_rows(np.asarray(prompts.ids, np.uint32), more),
            )
            # K is the shape of `keys`; everything that changes without a new program is a traced argument.
            seeds = np.uint32(request.seed % 2**32), np.uint32(request.step)
            keys = jax.random.key_data(row_keys(*seeds, prompts.ids, K))
            dtype = jnp.dtype(self.dtype)
            batcher = ContinuousBatcher(
                DecodeSettings(self.config, self.eos_ids, request.distribution, dtype, self.attention),
                weights,
                prompts,
                np.asarray(keys),
                pad_rows(budgets, more),
                limit,
                self.max_rows,
                stop_finder(self.decode, request.stop),
                on_finished,
            )
            tokens, log_probs, entropies, *others = (x[:P] for x in batcher.run())
        T = max(1, others[0].max())
        return Responses(tokens[..., :T], log_probs[..., :T], entropies[..., :T], *others)
