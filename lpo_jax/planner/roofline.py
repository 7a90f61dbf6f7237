"""Roofline estimates: the time of a step at the limits of the hardware, and its memory, by arithmetic alone.

A phase is described by the work of each device: matrix FLOPs, bytes read and written, kernels started, and bytes sent
to other devices. It takes at least max(FLOPs / peak, bytes / bandwidth), plus the communication, which is assumed not
to overlap. On a GPU this holds for each kernel, which takes some microseconds at least, with the parts of peak and
bandwidth that were measured (`topology.Chip`).
`estimate_phases` derives these figures from the sizes of the model; `lpo_jax.planner.programs` reads them from compiled
programs. Estimates rank settings; plans report the compiled figures, unless only an estimate is asked for.

Axes: P prompts · K responses · S prompt tokens · T response tokens · L D H G N F V of the model.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lpo_jax.config import Config
from lpo_jax.models import lora
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.head import chunk_size
from lpo_jax.models.lora import keeps_tower
from lpo_jax.models.packing import full_splits
from lpo_jax.models.prompt_images import ROW_PATCHES
from lpo_jax.objectives.batch import Field
from lpo_jax.planner.phases import Exchange, StepPhase
from lpo_jax.planner.setting import (
    FULL,
    HALF,
    Setting,
    Workload,
    decoder_bytes,
    kv_bytes,
    recent_bytes,
    weight_bytes,
)
from lpo_jax.planner.sizes import TRAINED_PASSES, Sizes
from lpo_jax.sampling.calls import look_seconds

# Assumed bytes a second between the memory of the host and one device, with all of its devices at work.
HOST_LINK = 8e9
# The number of float32 arrays of the size of a chunk's logits that exist at once (`models.head`).
LOGIT_COPIES = 3
# Queries of a row whose scores are assumed to be in memory at once. Plain attention has fewer, and kernels have none.
# The estimate is deliberately conservative: settings that it accepts are compiled next, and a failed compile costs a
# minute.
SCORED = 512
# Kernels of one layer's forward pass on a GPU.
KERNELS = 12


def model_flops(work: Workload) -> float:
    """Return the model FLOPs of a step's updates.

    They are 6 per parameter and token, 4 with frozen weights, and three times those of attention. Those of a vision
    tower are counted three times too, or once if it is frozen; those of adapters are left out.
    """
    sizes = Sizes.of(work.model)
    responses = work.P * work.K * work.T
    matrices = 2 * (1 + work.backward) * (sizes.layers * work.trained_tokens + sizes.head * responses)
    seen = work.P * work.tower.flops * work.tower_products if work.tower else 0.0
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
        pairs = (
            S * S / masked if phase == "prefill" else setting.call_tokens(work) * K * (S + work.mean_cached)
        )
        return pair * pairs * prompts / setting.mesh.decode_tensor
    groups = math.ceil(work.P / work.updates / setting.shards)
    forward = pair * (S * S / masked + K * T * (S + T / masked)) * groups / setting.mesh.tensor
    return forward * ((3.5 if work.kernels else 4) + setting.remat if phase == "update" else 1)


def decode_reads(work: Workload, setting: Setting) -> float:
    """Return the bytes of keys and values that a device reads in a decode step, mean over responses of full length."""
    return setting.tokens_read(work) * kv_bytes(work) / setting.mesh.decode_tensor


def _decode_temporaries(work: Workload, setting: Setting) -> float:
    """The bytes of the activations and logits of a decode step on a device."""
    rows = math.ceil(setting.rows / work.K / setting.decode_shards) * work.K
    logits = LOGIT_COPIES * FULL * work.model.vocab_size / setting.mesh.decode_tensor
    return rows * (work.itemsize * _activations(work, setting) + logits)


def _activations(work: Workload, setting: Setting) -> float:
    """The activations of one token in a layer while sampling."""
    m = work.model
    return 4 * m.width + (2 * m.num_heads * m.head_width + 3 * m.ffn_width) / setting.mesh.decode_tensor


def updated_bytes(work: Workload, setting: Setting) -> float:
    """Return the bytes that the optimizer reads and writes in an update: parameters, gradient and moments."""
    return (3 * FULL + 2 * work.moments) * setting.updated(work)


def moved_seconds(work: Workload, setting: Setting) -> float:
    """Return the seconds of an update that moments take from the memory of the host and back, once in a step."""
    moved = 2 * (work.optimizer == "host") * work.moments * setting.updated(work)
    return moved / HOST_LINK / work.updates


def standing(work: Workload, setting: Setting) -> dict[str, float]:
    """Return the bytes on a device that are in memory while responses are sampled, by their use.

    The optimizer's are 0 if they are in the memory of the host then.
    """
    sizes = Sizes.of(work.model)
    size = setting.capacity(work)
    kept = (size.prompts + size.prefill_batch * size.queued) * work.S + size.slots * size.tokens
    if work.kernels:
        pool = setting.pool(work)
        batch = max(1, pool.slots // work.K) * work.S  # prompts that are prefilled next
        kept = setting.decode_shards * (pool.pages * pool.page_size + batch)
    own = setting.updated(work)
    frozen = work.frozen * sizes.total if work.adapters else work.frozen_tower * sizes.tower
    return {
        "frozen weights": frozen / setting.parts,
        "parameters": FULL * own,
        "optimizer": (work.optimizer != "host") * work.moments * own,
        "reference": FULL * own * work.reference,
        "sampler's weights": weight_bytes(work, setting),
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
    rows = prompts * K
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
        setting.prefills(work),
        prompts * S * 2 * sizes.layers / parts + phase_attention(work, setting, "prefill"),
        decoder_bytes(work, setting) + 12 * L * prompts * S * D * item,
        state + weights + seen + (stored if setting.capacity(work).queued else 0),
        prompts * S * (item * width + 8 * m.num_heads / parts * min(S, SCORED)),
        sums(prompts * S),
        KERNELS * L,
    )
    tokens = setting.call_tokens(work)
    if work.kernels:
        read += tokens * recent_bytes(work, setting)
    products = tokens * rows * 2 * (sizes.layers + sizes.head) / parts
    yield StepPhase(
        "decode",
        setting.calls(work),
        products + phase_attention(work, setting, "decode"),
        tokens * (decoder_bytes(work, setting) + read),
        state + weights + seen + stored,
        _decode_temporaries(work, setting),
        sums(rows, tokens),
        KERNELS * L * tokens,
        host=look_seconds(setting.rows),
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
    towers = TRAINED_PASSES if work.tower_products > 1 else 1
    if scorings := setting.scorings(work):
        yield StepPhase(
            "score",
            scorings,
            forward + head + phase_attention(work, setting, "score") + vision.flops,
            traffic + vision.bytes,
            state + weights,
            max(micro * item * width + scores + logits, vision.temporary) + vision.held,
            (gathered(1), summed(1), *vision.exchanges),
            KERNELS * L * runs,
        )
    again = 1 if setting.remat else 0
    updated = setting.updated(work)
    yield StepPhase(
        "update",
        work.updates,
        (1 + work.backward + again) * forward
        + (1 + work.backward) * head
        + phase_attention(work, setting, "update")
        + towers * vision.flops,
        (3 + again) * traffic + updated_bytes(work, setting) + towers * vision.bytes,
        state + (work.optimizer == "host") * work.moments * updated,
        FULL * updated  # the gradient
        + max(
            L * micro * item * (D if setting.remat else width) + 2 * (micro * item * width + scores) + logits,
            vision.temporary * (1 if towers == 1 else 2),
        )
        + vision.held * (1 if towers == 1 else 3),
        (
            gathered(2 + again),
            summed(3 + again),
            *_summed_gradient(work, setting, FULL * updated, runs),
            *(dataclasses.replace(e, times=towers * e.times) for e in vision.exchanges),
        ),
        (3 + again) * KERNELS * L * runs,
        host=moved_seconds(work, setting),
    )


def _summed_gradient(work: Workload, setting: Setting, size: float, runs: int) -> tuple[Exchange, ...]:
    """The sum of the gradient of `size` bytes on a device, where each shard of the batch has a part of it."""
    if work.adapters:
        return (Exchange("all-reduce", size, setting.shards, 1, setting.hosts),)
    return (
        Exchange("reduce-scatter", size, setting.mesh.fsdp, runs),
        Exchange("all-reduce", size, setting.mesh.data, 1, setting.hosts),
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
    passes = updates if scores_first or (sampling.ahead and not rescored) else updates - 1
    with_int8 = updates if scores_first else updates - 1
    return Workload(
        model,
        training.prompts_per_step,
        sampling.num_responses,
        sampling.max_prompt_tokens,
        sampling.max_tokens,
        updates,
        HALF if config.model.dtype == "bfloat16" else FULL,
        reference,
        passes + updates * (rescored + reference),
        with_int8 + updates * (1 + reference),
        sampling.ahead,
        kv_dtype=sampling.kv_dtype,
        optimizer=config.optimizer.state,
        adapters=num_adapters(config, model),
        frozen=jnp.dtype(config.model.frozen_dtype).itemsize if config.model.lora.rank else 0,
        image_tokens=model.vision.processor.most_tokens(sampling.max_prompt_tokens) if model.vision else 0,
        frozen_tower=frozen * keeps_tower(config.model, model),
    )


def num_adapters(config: Config, model: ModelConfig) -> int:
    """Return the number of parameters of the adapters that a run trains; 0 if it trains the weights."""
    adapters = lora.configured(config.model.lora)
    if adapters is None:
        return 0
    return sum(leaf.size for leaf in jax.tree.leaves(lora.abstract_params(model, adapters)))
