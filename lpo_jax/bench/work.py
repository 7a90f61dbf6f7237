"""The arithmetic and the traffic that a batch takes at least.

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
    """What one pass takes, with every prompt computed once: nothing recomputed, nothing padded.

    Attributes:
      product_flops: two for each weight that a token meets; the matrix-product floor counts these alone.
      attention_flops: four H N for each query and the key it sees.
      weight_bytes: all weights read once, in the dtype they are used in.
      cache_bytes: keys and values of all tokens, in that dtype.
      steps: of sampling, as many as the longest response has tokens.
      cache_reads: bytes of keys and values that sampling reads: a prompt's once a step for its whole group, a row's
        own once a step.
    """

    product_flops: float
    attention_flops: float
    weight_bytes: float
    cache_bytes: float
    steps: int
    cache_reads: float

    @classmethod
    def forward(cls, config: ModelConfig, shapes: Shapes, lengths: np.ndarray, itemsize: int) -> "Work":
        """One forward pass over P prompts and their `lengths [P, K]` response tokens."""
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
        """Read while sampling one token at a time: all weights and what is kept, once a step."""
        return self.weight_bytes * self.steps + self.cache_reads

    @property
    def flops(self) -> float:
        """All of them."""
        return self.product_flops + self.attention_flops
