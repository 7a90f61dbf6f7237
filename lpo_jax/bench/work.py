"""The shapes and token ids of a benchmark's batch, and the FLOPs and memory traffic that it needs at least.

Axes: P prompts · K responses · S prompt tokens · T response tokens · L D H G N F V.
"""

import dataclasses

import numpy as np

from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import abstract_params, unembedding
from lpo_jax.models.parameters import num_params


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of a batch.

    Attributes:
      prompts: P.
      responses: K, responses per prompt.
      prompt_tokens: S, the length of every prompt.
      tokens: T, the length of every response, or the maximum length if they are uneven.
      uneven: whether response lengths are geometric with a mean of T / 8.
    """

    prompts: int
    responses: int
    prompt_tokens: int
    tokens: int
    uneven: bool = False

    def lengths(self, seed: int = 0) -> np.ndarray:
        """Return the response lengths, `[P, K]` int32."""
        size = (self.prompts, self.responses)
        if not self.uneven:
            return np.full(size, self.tokens, np.int32)
        drawn = np.random.default_rng(seed).geometric(min(1.0, 8 / self.tokens), size)
        return np.minimum(drawn, self.tokens).astype(np.int32)

    def mask(self) -> np.ndarray:
        """Return the mask of response tokens, `[P, K, T]` bool."""
        return np.arange(self.tokens) < self.lengths()[..., None]

    def response_ids(self, vocab_size: int, seed: int = 1) -> np.ndarray:
        """Return random response ids, `[P, K, T]` int32; 0 beyond the length of a response."""
        mask = self.mask()
        return np.where(mask, np.random.default_rng(seed).integers(0, vocab_size, mask.shape), 0).astype(
            np.int32
        )

    def prompt_ids(self, vocab_size: int, seed: int = 0) -> np.ndarray:
        """Return random prompt ids, `[P, S]` int32."""
        size = (self.prompts, self.prompt_tokens)
        return np.random.default_rng(seed).integers(0, vocab_size, size).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one forward pass that computes every prompt once, without recomputation or padding.

    Attributes:
      product_flops: FLOPs of the matrix products, 2 per token and weight. The floor counts only these.
      attention_flops: FLOPs of attention, 4 H N per query and visible key.
      weight_bytes: bytes of all weights in the compute dtype.
      cache_bytes: bytes of the keys and values of all tokens in the compute dtype.
      steps: number of sampling steps, the number of tokens of the longest response.
      cache_reads: bytes of the KV cache that sampling reads. In each step the prompt's part is read once per group and
        the part of the response once per row.
    """

    product_flops: float
    attention_flops: float
    weight_bytes: float
    cache_bytes: float
    steps: int
    cache_reads: float

    @classmethod
    def forward(cls, config: ModelConfig, shapes: Shapes, lengths: np.ndarray, itemsize: int) -> "Work":
        """Return the work of one forward pass over P prompts and response lengths `lengths [P, K]`."""
        matrices, head = num_params(config, "matrix"), unembedding(abstract_params(config))
        S, T = shapes.prompt_tokens, lengths.astype(float)
        tokens = shapes.prompts * S + T.sum()
        pairs = shapes.prompts * S**2 / 2 + (S * T + T**2 / 2).sum()
        kept = 2 * config.num_layers * config.num_kv_heads * config.head_width
        return cls(
            2.0 * (matrices * tokens + head.size * T.sum()),
            4.0 * config.num_layers * config.num_heads * config.head_width * pairs,
            float(num_params(config) * itemsize),
            float(kept * tokens * itemsize),
            int(lengths.max(initial=0)),
            float(kept * itemsize * (S * T.max(axis=1, initial=0).sum() + (T**2 / 2).sum())),
        )

    @property
    def sampling_bytes(self) -> float:
        """Bytes read while sampling: all weights and the valid part of the KV cache, once per step."""
        return self.weight_bytes * self.steps + self.cache_reads

    @property
    def flops(self) -> float:
        """FLOPs of matrix products and attention."""
        return self.product_flops + self.attention_flops
