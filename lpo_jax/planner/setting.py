"""What is planned: the sizes of a step, and the choices of a user for a slice.

Axes: P prompts · K responses · S prompt tokens · T response tokens.
"""

import dataclasses
import functools
import math

import numpy as np

from lpo_jax.models.config import ModelConfig
from lpo_jax.models.eight_bits import KVDtype, stored_dtype
from lpo_jax.parallel.mesh import MeshSizes
from lpo_jax.planner.simulation import Sampled, simulate_pages
from lpo_jax.planner.sizes import Sizes, TowerWork
from lpo_jax.sampling.calls import planned_call_tokens
from lpo_jax.sampling.kv_cache import FIRST_TOKENS, Capacity, token_bytes
from lpo_jax.sampling.pages import Pool

HALF, FULL = 2, 4  # bytes of bfloat16 and of float32


@dataclasses.dataclass(frozen=True)
class Workload:
    """The sizes of one step: P prompts of at most S tokens, K responses of at most T each, in `updates` minibatches."""

    model: ModelConfig
    P: int
    K: int
    S: int
    T: int
    updates: int
    itemsize: int  # bytes of an activation and of one of the sampler's weights
    reference: bool  # whether a frozen copy of the parameters is kept
    scorings: int  # forward passes over a minibatch that only score, with those of the reference
    rescorings: int = 0  # those with int8 weights, after whose sampling the trainer computes all log-probs
    ahead: int = 0  # later steps whose prompts take free slots
    kernels: bool = False  # whether attention runs in kernels, which skip masked pairs and unused cache
    kv_dtype: KVDtype = "compute"  # of the KV cache
    platform: str = "tpu"  # "tpu" or "gpu"
    optimizer: str = "float32"  # `optimizer.state`
    adapters: int = 0  # parameters of adapters, on frozen weights; 0: the weights are trained
    frozen: int = 0  # bytes of a frozen weight
    image_tokens: int = 0  # of an image, one in each prompt; 0: the model reads text only
    frozen_tower: int = 0  # bytes of a parameter of a frozen vision tower; 0: there is none

    @property
    def tower(self) -> TowerWork | None:
        """The work of the vision tower for one prompt; None without one."""
        return TowerWork.of(self.model, self.image_tokens) if self.image_tokens else None

    @property
    def tower_products(self) -> int:
        """Matrix products of the vision tower per product of its forward pass."""
        return 1 if self.frozen_tower else 1 + self.backward

    @property
    def trained(self) -> int:
        """The number of parameters that the optimizer updates if there are no adapters."""
        sizes = Sizes.of(self.model)
        return sizes.total - sizes.tower * (self.frozen_tower > 0)

    @property
    def trained_tokens(self) -> int:
        """Tokens in a step: every prompt once and every response, at full length."""
        return self.P * (self.S + self.K * self.T)

    @property
    def moments(self) -> int:
        """Bytes of the two moments of a parameter."""
        return 2 * (HALF if self.optimizer == "bfloat16" else FULL)

    @property
    def backward(self) -> int:
        """Matrix products of the backward pass per product of the forward pass; frozen weights need no gradient."""
        return 1 if self.adapters else 2

    @property
    def mean_cached(self) -> float:
        """Tokens of a response that attention reads in a decode step, mean over a response of full length."""
        return self.T / 2 if self.kernels else mean_cache_tokens(self.T)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The choices of a user for a given slice.

    Attributes:
      mesh: the sizes of the mesh.
      token_budget: the most tokens in a row of a microbatch.
      remat: whether layers are recomputed in the backward pass.
      rows: responses that are sampled at once; the others are queued.
      kv_tokens: tokens that the KV cache holds, with kernels; 0: as many as `rows` rows of full length need.
      int8: whether the layers' matrices are in 8 bits while sampling.
      hosts: the number of hosts that only a network connects, over which the data axis is laid out.
    """

    mesh: MeshSizes
    token_budget: int
    remat: bool
    rows: int
    kv_tokens: int = 0
    int8: bool = False
    hosts: int = 1

    @property
    def shards(self) -> int:
        """The number of shards of a minibatch."""
        return self.mesh.data * self.mesh.fsdp

    @property
    def parts(self) -> int:
        """The number of devices that a parameter and its optimizer state are split over."""
        return self.mesh.fsdp * self.mesh.tensor

    @property
    def decode_shards(self) -> int:
        """The number of shards of the prompts while sampling."""
        return self.mesh.devices // self.mesh.decode_tensor

    def updated(self, work: Workload) -> float:
        """Return the number of parameters on a device that the optimizer updates; adapters are whole on each."""
        return work.adapters or work.trained / self.parts

    def scorings(self, work: Workload) -> int:
        """Return the forward passes over a minibatch that only score."""
        return work.rescorings if self.int8 else work.scorings

    def waves(self, work: Workload) -> int:
        """How often the sampler fills all its rows in a step, with every response at full length."""
        return math.ceil(work.P * work.K / self.rows)

    def call_tokens(self, work: Workload) -> int:
        """Return the number of tokens that every row draws in one call of `sampling.decode`, at most T."""
        recent = recent_bytes(work, self) if work.kernels else 0.0
        chosen = planned_call_tokens(work.T, self.rows, decoder_bytes(work, self), recent, work.platform)
        return min(chosen, work.T)

    def calls(self, work: Workload) -> int:
        """Return the number of calls of `sampling.decode` in a step, with every response at full length."""
        tokens = self.call_tokens(work)
        if self.kv_tokens:  # rows wait for pages
            return math.ceil(_full_length(work, self).steps / tokens)
        return self.waves(work) * math.ceil(work.T / tokens)

    def tokens_read(self, work: Workload) -> float:
        """Return the tokens whose keys and values attention of a shard reads in a decode step.

        It is the mean over all steps, with every response at full length.
        """
        if self.kv_tokens:  # rows wait for pages
            return _full_length(work, self).tokens_read(work.S)
        return math.ceil(self.rows / work.K / self.decode_shards) * (work.S + work.K * work.mean_cached)

    def prefills(self, work: Workload) -> int:
        """Return the number of prefills in a step, with every response at full length."""
        if not self.kv_tokens:
            return self.waves(work)
        sampled, batch = _full_length(work, self), max(1, self.pool(work).slots // work.K)
        return math.ceil((sampled.prompts + sampled.repeated / work.S) / batch)

    def pool(self, work: Workload) -> Pool:
        """Return the sizes of the pages of one shard, with kernels."""
        shards = self.decode_shards
        P, rows = work.P + -work.P % shards, min(self.rows or work.P * work.K, work.P * work.K)
        return Pool.of(P * (1 + work.ahead), work.K, work.S, work.T, rows, self.kv_tokens, shards)

    def capacity(self, work: Workload) -> Capacity:
        """Return the sizes of the sampler's KV caches, over all devices together."""
        shards = self.decode_shards
        P = work.P + -work.P % shards
        rows = min(self.rows or P * work.K, P * work.K)
        return Capacity.of(P * (1 + work.ahead), work.K, work.T, rows, shards)

    def describe(self) -> str:
        """Describe the setting in words."""
        m = self.mesh
        weights = f"split over {m.decode_tensor}" if m.decode_tensor > 1 else "whole on every device"
        return (
            f"data {m.data} x fsdp {m.fsdp} x tensor {m.tensor}, {self.token_budget} tokens in a row of a microbatch, "
            f"{'remat' if self.remat else 'no remat'}, {self.rows} rows sampled at once, their weights {weights}"
            + (f", {self.kv_tokens} tokens in the KV cache" if self.kv_tokens else "")
            + (", in int8" if self.int8 else "")
        )

    def overrides(self) -> list[str]:
        """Return the setting as command-line overrides of the config."""
        keys = {
            "mesh.data": self.mesh.data,
            "mesh.fsdp": self.mesh.fsdp,
            "mesh.tensor": self.mesh.tensor,
            "mesh.decode_tensor": self.mesh.decode_tensor,
            "training.token_budget": self.token_budget,
            "training.remat": str(self.remat).lower(),
            "sampling.max_rows": self.rows,
        }
        keys |= {"sampling.kv_tokens": self.kv_tokens} if self.kv_tokens else {}
        keys |= {"sampling.weights": "int8"} if self.int8 else {}
        return [f"--{key}={value}" for key, value in keys.items()]


@functools.cache
def _full_length(work: Workload, setting: Setting) -> Sampled:
    """The simulated sampling of responses of full length, of which a pool holds fewer than there are slots."""
    shards = setting.decode_shards
    lengths = np.full((work.P + -work.P % shards, work.K), work.T)
    return simulate_pages(lengths, setting.pool(work), work.S - 1, shards, setting.call_tokens(work))


def kv_bytes(work: Workload) -> int:
    """Return the bytes of the keys and values of one token in all layers."""
    compute = "float32" if work.itemsize == FULL else "bfloat16"
    return token_bytes(work.model, stored_dtype(work.kv_dtype, np.dtype(compute)))


def weight_bytes(work: Workload, setting: Setting) -> float:
    """Return the bytes of the sampler's weights on a device."""
    sizes = Sizes.of(work.model)
    saved = (work.itemsize - 1) * sizes.layers if setting.int8 else 0
    return (work.itemsize * sizes.total - saved) / setting.mesh.decode_tensor


def decoder_bytes(work: Workload, setting: Setting) -> float:
    """Return the bytes of the sampler's weights on a device without those of a vision tower."""
    tower = work.itemsize * Sizes.of(work.model).tower
    return weight_bytes(work, setting) - tower / setting.mesh.decode_tensor


def recent_bytes(work: Workload, setting: Setting) -> float:
    """Return the bytes of the keys and values on a device of one token of each row."""
    return setting.rows / setting.decode_shards * kv_bytes(work) / setting.mesh.decode_tensor


def mean_cache_tokens(T: int, first: int = FIRST_TOKENS) -> float:
    """Return the mean length of the response cache while T tokens are drawn: it doubles from `first` as they grow."""
    total, size, done = 0, min(first, T), 0
    while done < T:
        total += (size - done) * size
        done, size = size, min(2 * size, T)
    return total / T
