"""Batched generation: prefill once per prompt, decode K rows each on the device until all have ended."""

from lpo_jax.sampling.distribution import Sampling, row_keys
from lpo_jax.sampling.request import PromptBatch, SampleRequest
from lpo_jax.sampling.sampler import Responses, Sampler

__all__ = ["PromptBatch", "Responses", "SampleRequest", "Sampler", "Sampling", "row_keys"]
