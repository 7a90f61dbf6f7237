"""The shapes and token ids of a benchmark's batch.

Axes: P prompts · K responses · S prompt tokens · T response tokens.
"""

import dataclasses

import numpy as np


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
