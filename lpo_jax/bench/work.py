"""The FLOPs and the memory traffic that a batch needs at least.

Axes: P prompts · K responses · S prompt tokens · T response tokens · L D H G N F V.
"""

import dataclasses

import numpy as np

from lpo_jax.bench.shapes import Shapes
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import abstract_params, unembedding
from lpo_jax.models.parameters import num_params


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
