"""Batched generation: K responses for each of P prompts, on the device, until every row has ended.

A prompt is prefilled once and its keys and values are stored once per prompt; its rows attend to them. Rows that
end give their places to waiting ones, and the last stragglers run in a smaller batch (`schedule`). None of this
changes a row's tokens: its random numbers are its own (`row_keys`).

Axes: P prompts · K responses · S prompt tokens (padded) · T response tokens · V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lpo_jax.models import decoder
from lpo_jax.models.attention import Attention
from lpo_jax.models.config import ModelConfig
from lpo_jax.parallel import sharding
from lpo_jax.sampling.batching import Schedule
from lpo_jax.sampling.decode import decode_layout
from lpo_jax.sampling.distribution import row_keys
from lpo_jax.sampling.padding import pad_rows
from lpo_jax.sampling.request import PromptBatch, SampleRequest
from lpo_jax.sampling.stop_strings import stopper


@dataclasses.dataclass(frozen=True)
class Responses:
    """What was sampled, on the host. All `[P, K]` unless said otherwise."""

    tokens: np.ndarray  # [P, K, T] int32, T the longest real length; past a row's length: 0
    log_probs: np.ndarray  # [P, K, T] float32, of the distribution sampled from
    lengths: np.ndarray  # int32, the end token included
    finished: np.ndarray  # bool: ended by itself; False: cut at its budget
    row_steps: np.ndarray  # float32: steps that the device ran a row for this response, idle ones included

    @property
    def mask(self) -> np.ndarray:
        """`[P, K, T]`, true at response tokens, the end token included."""
        return np.arange(self.tokens.shape[-1]) < self.lengths[..., None]

    def take(self, prompts: np.ndarray) -> "Responses":
        """Those of some prompts, in the given order."""
        return Responses(*(x[prompts] for x in vars(self).values()))

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
      mesh: `sharding.decode_mesh` of the mesh that the parameters lie on; None: one device.
      max_rows: rows on all devices at once, 0: all; the others wait.
      attention: kernels for TPUs, or plain products (`lpo_jax.models.attention`).
    """

    config: ModelConfig
    eos_ids: tuple[int, ...]
    dtype: Any = jnp.float32
    decode: Callable[[list[int]], str] | None = None
    mesh: Mesh | None = None
    max_rows: int = 0
    attention: Attention = "auto"

    def prepare(self, params: decoder.Params, int8: bool = False) -> decoder.Params:
        """The weights in decode layout: one dict per layer, in the sampling dtype. Once per round.

        Args:
          int8: matrices of 8 bits (`lpo_jax.models.quantize`).
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
          budgets: `[P, K]` maximum tokens of each response, where that is fewer than `request.max_tokens`; 0: the
            response is not sampled and has length 0.
          at_least: a batch of fewer prompts is padded to this number with empty prompts, which are not sampled. A
            last, smaller batch then needs no program of its own.
          on_finished: called with p, k and the token ids of each finished response, in any order, while the device
            continues with the others.
        """
        P, K = len(prompts.tokens), request.num_responses
        limit = request.max_tokens
        budgets = np.full((P, K), limit) if budgets is None else np.minimum(budgets, limit)
        with sharding.using(self.mesh):
            # Every device has the same number of prompts.
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
            schedule = Schedule(
                (self.config, self.eos_ids, request.distribution, jnp.dtype(self.dtype)),
                weights,
                prompts,
                np.asarray(keys),
                pad_rows(budgets, more),
                limit,
                self.max_rows,
                stopper(self.decode, request.stop),
                on_finished,
                self.attention,
            )
            tokens, log_probs, *others = (x[:P] for x in schedule.run())
        T = max(1, others[0].max())
        return Responses(tokens[..., :T], log_probs[..., :T], *others)
