"""Batched generation: prefill once per prompt, decode K rows each on the device until all have ended."""

from lpo_jax.sampling.distribution import Sampling, row_keys
from lpo_jax.sampling.generate import Responses, Sampler

__all__ = ["Responses", "Sampler", "Sampling", "row_keys"]
