"""Sampling: prefill each prompt once, then decode its K responses with a KV cache and continuous batching.

`SampleRequest` and `PromptBatch` are what a caller passes in, `Sampler` is what it calls, and `Responses` is what it
gets. `lpo_jax.sampling.model` has the public `load_model` with texts in and out.
"""

from lpo_jax.sampling.distribution import Sampling, row_keys
from lpo_jax.sampling.request import PromptBatch, SampleRequest
from lpo_jax.sampling.responses import Ahead, Responses
from lpo_jax.sampling.sampler import Sampler

__all__ = ["Ahead", "PromptBatch", "Responses", "SampleRequest", "Sampler", "Sampling", "row_keys"]
