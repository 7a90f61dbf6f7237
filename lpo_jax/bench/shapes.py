"""What a benchmark asks of the model.

Axes: P prompts · K responses · S prompt tokens · T response tokens.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shapes:
    """P prompts of S tokens, K responses to each of at most T tokens; `uneven`: geometric, T / 8 on average."""

    prompts: int
    responses: int
    prompt_tokens: int
    tokens: int
    uneven: bool = False

    def lengths(self, seed: int = 0) -> np.ndarray:
        """`[P, K]` int32 response tokens."""
        size = (self.prompts, self.responses)
        if not self.uneven:
            return np.full(size, self.tokens, np.int32)
        drawn = np.random.default_rng(seed).geometric(min(1.0, 8 / self.tokens), size)
        return np.minimum(drawn, self.tokens).astype(np.int32)

    def mask(self) -> np.ndarray:
        """`[P, K, T]`, true at response tokens."""
        return np.arange(self.tokens) < self.lengths()[..., None]

    def response_ids(self, vocab_size: int, seed: int = 1) -> np.ndarray:
        """`[P, K, T]` int32 ids, any; 0 past a response's length."""
        mask = self.mask()
        return np.where(mask, np.random.default_rng(seed).integers(0, vocab_size, mask.shape), 0).astype(
            np.int32
        )

    def prompt_ids(self, vocab_size: int, seed: int = 0) -> np.ndarray:
        """`[P, S]` int32 ids, any."""
        size = (self.prompts, self.prompt_tokens)
        return np.random.default_rng(seed).integers(0, vocab_size, size).astype(np.int32)
