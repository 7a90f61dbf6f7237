"""Roofline estimates: the time of a step at the limits of the hardware, and its memory, by arithmetic alone.

A phase is described by the work of each device: matrix FLOPs, bytes read and written, and bytes sent to other devices.
It takes at least max(FLOPs / peak, bytes / bandwidth), plus the communication, which is assumed not to overlap.
`estimate_phases` derives these figures from the sizes of the model; `lpo_jax.planner.programs` reads them from compiled
programs. Estimates rank settings, and are the only figures for GPUs; for TPUs, plans report the compiled figures.

Axes: P prompts · K responses · S prompt tokens · T response tokens · L D H G N F V of the model.
"""

import dataclasses
import math
from collections.abc import Iterator

from lpo_jax.config import Config
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.head import chunk_size
from lpo_jax.models.lora import freezes_tower
from lpo_jax.models.packing import full_splits
from lpo_jax.models.prompt_images import ROW_PATCHES
from lpo_jax.objectives.batch import Field
from lpo_jax.parallel.mesh import MeshSizes
from lpo_jax.planner.phases import Exchange, StepPhase
from lpo_jax.planner.sizes import TRAINED_PASSES, Sizes, TowerWork
from lpo_jax.sampling.kv_cache import CHUNK, FIRST_TOKENS, Capacity
from lpo_jax.sampling.pages import Pool

HALF, FULL = 2, 4  # bytes of bfloat16 and of float32
# The number of float32 arrays of the size of a chunk's logits that exist at once (`models.head`).
LOGIT_COPIES = 3
# Queries of a row whose scores are assumed to be in memory at once. Plain attention has fewer, and kernels have none.
# The estimate is deliberately conservative: settings that it accepts are compiled next, and a failed compile costs a
# minute.
SCORED = 512


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
    ahead: int = 0  # later steps whose prompts take free slots
    kernels: bool = False  # whether attention runs in kernels, which skip masked pairs and unused cache
    image_tokens: int = 0  # of an image, one in each prompt; 0: the model reads text only
    frozen_tower: int = 0  # bytes of a parameter of a frozen vision tower; 0: there is none

    @property
    def tower(self) -> TowerWork | None:
        """The work of the vision tower for one prompt; None without one."""
        return TowerWork.of(self.model, self.image_tokens) if self.image_tokens else None

    @property
    def trained(self) -> int:
        """The number of parameters that the optimizer updates."""
        sizes = Sizes.of(self.model)
        return sizes.total - sizes.tower * (self.frozen_tower > 0)

    @property
    def trained_tokens(self) -> int:
        """Tokens in a step: every prompt once and every response, at full length."""
        return self.P * (self.S + self.K * self.T)

    @property
    def call_tokens(self) -> int:
        """Tokens that every row draws in one call of `sampling.decode`."""
        return min(CHUNK, self.T)

    @property
    def mean_cached(self) -> float:
        """Tokens of a response that attention reads in a decode step, mean over a response of full length."""
        return self.T / 2 if self.kernels else mean_cache_tokens(self.T)

    @property
    def calls(self) -> int:
        """Calls of `sampling.decode` until a response has its full length."""
        return math.ceil(self.T / self.call_tokens)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The choices of a user for a given slice.

    Attributes:
      mesh: the sizes of the mesh.
      token_budget: the most tokens in a row of a microbatch.
      remat: whether layers are recomputed in the backward pass.
      rows: responses that are sampled at once; the others are queued.
      kv_tokens: tokens that the KV cache holds, with kernels; 0: as many as `rows` rows of full length need.
    """

    mesh: MeshSizes
    token_budget: int
    remat: bool
    rows: int
    kv_tokens: int = 0

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

    def waves(self, work: Workload) -> int:
        """How often the sampler fills all its rows in a step, with every response at full length."""
        rows = self.rows
        if self.kv_tokens:  # as many as fit
            pool = self.pool(work)
            of_group = pool.pages_of(work.S - 1) + work.K * pool.pages_of(work.T)
            rows = min(rows, max(1, self.decode_shards * work.K * pool.pages // of_group))
        return math.ceil(work.P * work.K / rows)

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
        } | ({"sampling.kv_tokens": self.kv_tokens} if self.kv_tokens else {})
        return [f"--{key}={value}" for key, value in keys.items()]


def model_flops(work: Workload) -> float:
    """Return the model FLOPs of a step's updates: 6 per parameter and token, and three times those of attention.

    Those of a vision tower are counted three times too, or once if it is frozen.
    """
    sizes = Sizes.of(work.model)
    responses = work.P * work.K * work.T
    matrices = 6 * (sizes.layers * work.trained_tokens + sizes.head * responses)
    seen = work.P * work.tower.flops * (1 if work.frozen_tower else 3) if work.tower else 0.0
    return matrices + 3 * attention_flops(work, work.P) + seen


def attention_flops(work: Workload, prompts: int) -> float:
    """Return the FLOPs of attention in one forward pass. Masked pairs are computed too, as in plain attention."""
    m, S, K, T = work.model, work.S, work.K, work.T
    pairs = S * S + K * T * (S + T)
    return 4.0 * m.num_layers * m.num_heads * m.head_width * pairs * prompts


def phase_attention(work: Workload, setting: Setting, phase: str) -> float:
    """Return the FLOPs of attention in one run of a phase on one device. Kernels skip masked pairs.

    The forward pass has two products and the backward pass four; kernels recompute the scores there.
    """
    m, S, K, T = work.model, work.S, work.K, work.T
    pair, masked = 4.0 * m.num_layers * m.num_heads * m.head_width, 2 if work.kernels else 1
    if phase in ("prefill", "decode"):
        prompts = math.ceil(setting.rows / K / setting.decode_shards)
        pairs = S * S / masked if phase == "prefill" else work.call_tokens * K * (S + work.mean_cached)
        return pair * pairs * prompts / setting.mesh.decode_tensor
    groups = math.ceil(work.P / work.updates / setting.shards)
    forward = pair * (S * S / masked + K * T * (S + T / masked)) * groups / setting.mesh.tensor
    return forward * ((3.5 if work.kernels else 4) + setting.remat if phase == "update" else 1)


def decode_reads(work: Workload, setting: Setting) -> float:
    """Return the bytes of keys and values that a device reads in a decode step, mean over responses of full length."""
    prompts = math.ceil(setting.rows / work.K / setting.decode_shards)
    tokens = prompts * (work.S + work.K * work.mean_cached)
    if setting.kv_tokens:  # rows wait for pages
        tokens = min(tokens, setting.kv_tokens / setting.decode_shards)
    return tokens * kv_bytes(work) / setting.mesh.decode_tensor


def decode_temporaries(work: Workload, setting: Setting) -> float:
    """Return the bytes of the activations and logits of a decode step on a device."""
    rows = math.ceil(setting.rows / work.K / setting.decode_shards) * work.K
    logits = LOGIT_COPIES * FULL * work.model.vocab_size / setting.mesh.decode_tensor
    return rows * (work.itemsize * _activations(work, setting) + logits)


def _activations(work: Workload, setting: Setting) -> float:
    """The activations of one token in a layer while sampling."""
    m = work.model
    return 4 * m.width + (2 * m.num_heads * m.head_width + 3 * m.ffn_width) / setting.mesh.decode_tensor


def kv_bytes(work: Workload) -> int:
    """Return the bytes of the keys and values of one token in all layers."""
    m = work.model
    return 2 * m.num_layers * m.num_kv_heads * m.head_width * work.itemsize


def mean_cache_tokens(T: int, first: int = FIRST_TOKENS) -> float:
    """Return the mean length of the response cache while T tokens are drawn: it doubles from `first` as they grow."""
    total, size, done = 0, min(first, T), 0
    while done < T:
        total += (size - done) * size
        done, size = size, min(2 * size, T)
    return total / T


def standing(work: Workload, setting: Setting) -> dict[str, float]:
    """Return the bytes on a device that are in memory during a whole step, by their use."""
    sizes, parts = Sizes.of(work.model), setting.mesh.decode_tensor
    size = setting.capacity(work)
    kept = (size.prompts + size.prefill_batch * size.queued) * work.S + size.slots * size.tokens
    if work.kernels:
        pool = setting.pool(work)
        batch = max(1, pool.slots // work.K) * work.S  # prompts that are prefilled next
        kept = setting.decode_shards * (pool.pages * pool.page_size + batch)
    frozen = {"frozen tower": work.frozen_tower * sizes.tower / setting.parts} if work.frozen_tower else {}
    return frozen | {
        "parameters": FULL * work.trained / setting.parts,
        "optimizer": 2 * FULL * work.trained / setting.parts,
        "reference": FULL * work.trained * work.reference / setting.parts,
        "sampler's weights": work.itemsize * sizes.total / parts,
        "keys and values": kept * kv_bytes(work) / setting.mesh.devices,
    }


def _tower(work: Workload, prompts: int, shards: int, parts: int) -> StepPhase:
    """A forward pass of the vision tower over the images of some prompts; without one all figures are 0.

    What it holds is its outputs, which are replicated.
    """
    if (tower := work.tower) is None:
        return StepPhase("vision", 1, 0.0, 0.0, 0.0, 0.0)
    vision, item = work.model.vision, work.itemsize
    outputs = item * tower.outputs * prompts
    patches = math.ceil(prompts / shards) * tower.patches
    row = min(max(ROW_PATCHES, tower.patches), patches)
    scores = 2 * FULL * vision.num_heads / parts * min(tower.patches, SCORED)
    pixels = 3 * vision.processor.patch_size**2
    return StepPhase(
        "vision",
        1,
        math.ceil(prompts / shards) * tower.flops / parts,
        math.ceil(patches / row) * item * Sizes.of(work.model).tower / parts
        + patches * (pixels + 12 * vision.depth * vision.width * item),
        outputs,
        row * (item * tower.width / parts + scores + (FULL + item) * pixels) + patches * pixels,
        (
            Exchange("all-gather", outputs, shards, 1),
            Exchange("all-reduce", patches * vision.width * item, parts, 2 * vision.depth),
        ),
    )


def estimate_phases(work: Workload, setting: Setting) -> list[StepPhase]:
    """Estimate the phases of a step. Temporaries are those of plain attention."""
    phases = (*_sampling_phases(work, setting), *_training_phases(work, setting))
    apart = lambda phase: tuple(e for e in phase.exchanges if e.devices > 1)  # noqa: E731
    return [dataclasses.replace(phase, exchanges=apart(phase)) for phase in phases]


def _sampling_phases(work: Workload, setting: Setting) -> Iterator[StepPhase]:
    """Layout, prefill and decode: a device has all weights or a part of each, and some prompts with their rows."""
    m, sizes, mesh = work.model, Sizes.of(work.model), setting.mesh
    D, L, K, S, item = m.width, m.num_layers, work.K, work.S, work.itemsize
    *parameters, weights, stored = standing(work, setting).values()
    state = sum(parameters)
    parts = mesh.decode_tensor
    prompts = math.ceil(setting.rows / K / setting.decode_shards)
    rows, waves = prompts * K, setting.waves(work)
    read = decode_reads(work, setting)
    width = _activations(work, setting)
    sums = lambda tokens, turns=1: (Exchange("all-reduce", tokens * D * item, parts, 2 * L * turns),)  # noqa: E731
    moved = (Exchange("all-gather", weights / L, mesh.fsdp, 1),)
    vision = _tower(work, work.P * (1 + work.ahead), setting.decode_shards, parts)
    seen = vision.held
    yield StepPhase("layout", L, 0.0, 3 * weights / L, state + weights, weights / L, moved)
    if work.tower:
        yield dataclasses.replace(vision, held=state + weights, temporary=vision.temporary + seen)
    yield StepPhase(
        "prefill",
        waves,
        prompts * S * 2 * sizes.layers / parts + phase_attention(work, setting, "prefill"),
        item * sizes.decoder / parts + 12 * L * prompts * S * D * item,
        state + weights + seen + (stored if setting.capacity(work).queued else 0),
        prompts * S * (item * width + 8 * m.num_heads / parts * min(S, SCORED)),
        sums(prompts * S),
    )
    products = work.call_tokens * rows * 2 * (sizes.layers + sizes.head) / parts
    yield StepPhase(
        "decode",
        waves * work.calls,
        products + phase_attention(work, setting, "decode"),
        work.call_tokens * (item * sizes.decoder / parts + read),
        state + weights + seen + stored,
        decode_temporaries(work, setting),
        sums(rows, work.call_tokens),
    )


def _training_phases(work: Workload, setting: Setting) -> Iterator[StepPhase]:
    """Score and update: a microbatch is some groups on every device, or some responses of one group."""
    m, sizes, mesh = work.model, Sizes.of(work.model), setting.mesh
    D, L, K, S, T, item = m.width, m.num_layers, work.K, work.S, work.T, work.itemsize
    heads = m.num_heads * m.head_width
    *parameters, weights, _ = standing(work, setting).values()
    state = sum(parameters)
    parts = mesh.tensor
    group = full_splits(K, S, T, setting.token_budget) * S + K * T  # the prompt runs once with each split
    tokens = math.ceil(work.P / work.updates / setting.shards) * group
    micro = min(max(setting.token_budget, S + T), tokens)
    runs = math.ceil(tokens / micro)
    forward = 2 * sizes.layers * tokens / parts
    head = 2 * sizes.head * tokens * (K * T / group) / parts
    layers = item * sizes.decoder / parts
    traffic = runs * layers + 20 * L * tokens * D * item / parts
    gathered = lambda passes: Exchange("all-gather", layers, mesh.fsdp, runs * passes)  # noqa: E731
    summed = lambda passes: Exchange("all-reduce", micro * D * item, parts, 2 * L * runs * passes)  # noqa: E731
    width = 6 * D + (5 * heads + 4 * m.ffn_width) / parts
    scores = 8 * micro / (S + T) * m.num_heads / parts * min(T, SCORED) * (S + T)
    logits = LOGIT_COPIES * FULL * min(chunk_size(m.vocab_size), micro) * m.vocab_size / parts
    vision = _tower(work, work.P // work.updates, setting.shards, parts)
    towers = 1 if work.frozen_tower else TRAINED_PASSES
    if work.scorings:
        yield StepPhase(
            "score",
            work.scorings,
            forward + head + phase_attention(work, setting, "score") + vision.flops,
            traffic + vision.bytes,
            state + weights,
            max(micro * item * width + scores + logits, vision.temporary) + vision.held,
            (gathered(1), summed(1), *vision.exchanges),
        )
    again = 1 if setting.remat else 0
    yield StepPhase(
        "update",
        work.updates,
        (3 + again) * forward + 3 * head + phase_attention(work, setting, "update") + towers * vision.flops,
        (3 + again) * traffic + 28 * work.trained / setting.parts + towers * vision.bytes,
        state,
        FULL * work.trained / setting.parts  # the gradient
        + max(
            L * micro * item * (D if setting.remat else width) + 2 * (micro * item * width + scores) + logits,
            vision.temporary * (1 if work.frozen_tower else 2),
        )
        + vision.held * (1 if work.frozen_tower else 3),
        (
            gathered(2 + again),
            summed(3 + again),
            Exchange("reduce-scatter", FULL * work.trained / setting.parts, mesh.fsdp, runs),
            Exchange("all-reduce", FULL * work.trained / setting.parts, mesh.data, 1),
            *(dataclasses.replace(e, times=towers * e.times) for e in vision.exchanges),
        ),
    )


def workload(config: Config, model: ModelConfig, needs: frozenset[Field], scores_first: bool) -> Workload:
    """Return the sizes of one step of a config.

    Args:
      config: the config.
      model: the model's config.
      needs: the statistics that the objective needs.
      scores_first: whether log-probs are computed before the first update after sampling too.
    """
    training, sampling = config.training, config.sampling
    updates = training.updates_per_step
    reference = Field.REF_LOGP in needs
    frozen = HALF if config.model.frozen_dtype == "bfloat16" else FULL
    rescored = training.behaviour == "rescored"
    passes = (
        updates if scores_first or (sampling.ahead and not rescored) else updates - 1
    ) + updates * rescored
    return Workload(
        model,
        training.prompts_per_step,
        sampling.num_responses,
        sampling.max_prompt_tokens,
        sampling.max_tokens,
        updates,
        HALF if config.model.dtype == "bfloat16" else FULL,
        reference,
        passes + updates * reference,
        sampling.ahead,
        image_tokens=model.vision.processor.most_tokens(sampling.max_prompt_tokens) if model.vision else 0,
        frozen_tower=frozen * freezes_tower(config.model, model),
    )
