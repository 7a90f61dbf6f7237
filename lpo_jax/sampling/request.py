"""What a caller asks of the sampler: settings that hold for all prompts of a batch, and the prompts.

Axes: P prompts · K responses · S prompt tokens (padded).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lpo_jax.models.prompt_images import Images
from lpo_jax.sampling.distribution import Sampling


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """How to sample the responses to every prompt of a batch.

    The record passes unchanged from the caller through the collector and the sampler to continuous batching.

    Attributes:
      num_responses: K, responses per prompt.
      max_tokens: maximum length of a response in tokens, its end token included.
      distribution: temperature and truncation of the next-token distribution.
      stop: strings that end a response. The token that completes one of them is kept.
      seed: seed of the random numbers, modulo 2**32.
      step: folded into the seed, so that every training step draws new random numbers.
    """

    num_responses: int
    max_tokens: int
    distribution: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    seed: int = 0
    step: int = 0


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts to continue.

    Attributes:
      tokens: `[P, S]` int32 token ids, left-aligned; padding comes last.
      lengths: `[P]` int32 real tokens, at least 1.
      ids: `[P]` uint32 identities. A response's random numbers depend on its prompt's identity, not on its index.
      images: of each prompt; empty if no prompt has any.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    images: Sequence[Images] = ()
