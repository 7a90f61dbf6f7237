"""The time of a step at given response lengths, from its phases at full length.

Sampling is simulated call by call (`simulation`), and the rows of updates are packed as in a run. Phases at full length
give the cost of a slot, a prompt and a token; what they do not depend on, such as the weights, stays.

Axes: P prompts · K responses · S prompt tokens · T response tokens.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.models.packing import PackedSize, packed_size
from lpo_jax.planner import roofline
from lpo_jax.planner.phases import SPARE, Exchange, StepPhase
from lpo_jax.planner.setting import Setting, Workload, decoder_bytes, kv_bytes
from lpo_jax.planner.simulation import Sampled, simulate_pages, simulate_slots
from lpo_jax.planner.sizes import Sizes
from lpo_jax.planner.topology import Chip
from lpo_jax.sampling.calls import look_seconds

# Rows to try with pages, as multiples of those that reserve the longest response.
MORE_ROWS = (1, 2, 4, 8)
SAMPLING = ("prefill", "decode")  # the phases in which the KV cache is in memory


@dataclasses.dataclass(frozen=True)
class Occurring:
    """A step at given response lengths.

    Attributes:
      seconds: of each phase, all of its runs in a step.
      sampled: the simulated sampling.
      setting: the setting; its `kv_tokens` are 0 if each row reserves the longest response.
    """

    seconds: Mapping[str, float]
    sampled: Sampled
    setting: Setting

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclasses.dataclass(frozen=True)
class AtLengths:
    """A step at given response lengths, with both kinds of KV cache.

    Attributes:
      reserved: with a cache that reserves the longest response for every slot.
      pages: with a cache in pages, in all the memory that is free while responses are sampled; None with plain
        attention, or if the memory does not hold the pages of one row.
    """

    reserved: Occurring
    pages: Occurring | None

    @property
    def best(self) -> Occurring:
        """The faster one."""
        return min((self.reserved, self.pages or self.reserved), key=lambda one: one.step_seconds)


def at_lengths(
    work: Workload, setting: Setting, phases: Sequence[StepPhase], lengths: np.ndarray, chip: Chip
) -> AtLengths:
    """Estimate a step at given response lengths.

    Args:
      work: the sizes of the step.
      setting: the setting.
      phases: the phases of a step at full length.
      lengths: `[P, K]` response tokens.
      chip: the device.
    """
    by_name = {phase.name: phase for phase in phases}
    training = _training_seconds(work, setting, by_name, lengths, chip)
    costs = _Costs.of(work, setting, by_name, chip)
    shards, size = setting.decode_shards, setting.capacity(work)
    padded = np.pad(lengths, ((0, -work.P % shards), (0, 0)))
    whatever = {name: by_name[name].seconds(chip) for name in ("layout", "vision") if name in by_name}

    def occurring(sampled: Sampled, setting: Setting) -> Occurring:
        seconds = {**whatever, "prefill": costs.prefill(sampled), "decode": costs.decode(sampled), **training}
        return Occurring(seconds, sampled, setting)

    whole = _reserving(work, setting)
    if work.kernels:
        sampled = simulate_pages(padded, whole.pool(work), work.S - 1, shards, whole.call_tokens(work))
    else:
        sampled = simulate_slots(padded, size, shards, setting.call_tokens(work))
    reserved = occurring(sampled, whole)
    found = []
    free = (1 - SPARE) * chip.memory - max(by_name[name].memory for name in SAMPLING)
    for paged in _in_pages(work, setting, free) if work.kernels else ():
        sampled = simulate_pages(padded, paged.pool(work), work.S - 1, shards, paged.call_tokens(work))
        found.append(occurring(sampled, paged))
    return AtLengths(reserved, min(found, key=lambda one: one.step_seconds) if found else None)


def _reserving(work: Workload, setting: Setting) -> Setting:
    """The setting with as many rows as its KV cache holds if each of them reserves the longest response."""
    whole = dataclasses.replace(setting, kv_tokens=0)
    if not setting.kv_tokens:
        return whole
    shards = setting.decode_shards
    for slots in range(setting.rows // shards, 1, -1):
        whole = dataclasses.replace(whole, rows=slots * shards)
        pool = whole.pool(work)
        if shards * pool.pages * pool.page_size <= setting.kv_tokens:
            return whole
    return dataclasses.replace(whole, rows=shards)


def _in_pages(work: Workload, setting: Setting, free: float) -> Iterator[Setting]:
    """Settings whose KV cache holds fewer tokens than all of their rows may have.

    Its memory is that of the given setting's cache and the `free` bytes of a device. More rows need more temporaries,
    which leave less memory for tokens. Settings that do not hold the longest row are left out. If the given setting has
    `kv_tokens`, it is the only one.
    """
    if setting.kv_tokens:
        yield setting
        return

    def used(setting: Setting) -> float:
        phases = roofline.estimate_phases(work, setting)
        return max(phase.temporary for phase in phases if phase.name in SAMPLING)

    memory = roofline.standing(work, setting)["keys and values"] + used(setting) + free
    for more in sorted({min(more * setting.rows, work.P * work.K) for more in MORE_ROWS}):
        left = memory - used(dataclasses.replace(setting, rows=more))
        tokens = int(left * setting.mesh.devices / kv_bytes(work))
        prompts = max(1, more // work.K) * work.S  # prefilled next
        paged = dataclasses.replace(setting, rows=more, kv_tokens=max(tokens - prompts, 1))
        with contextlib.suppress(UserError):
            paged.pool(work).check(work.S, work.T)
            yield paged


@dataclasses.dataclass(frozen=True)
class _Costs:
    """The costs of sampling on one device: of a decode step, and the seconds of a prompt."""

    chip: Chip
    apart: float  # as `StepPhase.apart`
    weights: float  # bytes of a step whatever its rows
    launches: float  # kernels of a step
    slot: tuple[float, float, float]  # bytes, FLOPs and seconds of communication of a slot in a step
    token: float  # bytes of the keys and values of one token
    prompt_tokens: int
    prompt_seconds: float

    @classmethod
    def of(cls, work: Workload, setting: Setting, phases: Mapping[str, StepPhase], chip: Chip) -> "_Costs":
        size, shards, phase = setting.capacity(work), setting.decode_shards, phases["decode"]
        slots, steps = size.slots / shards, setting.call_tokens(work)
        weights = decoder_bytes(work, setting)
        rest = phase.bytes / steps - weights - roofline.decode_reads(work, setting)
        token = kv_bytes(work) / setting.mesh.decode_tensor
        sending = phase.shares(chip)["network"]
        slot = max(rest, 0.0) / slots, phase.flops / steps / slots, sending / steps / slots
        prefill = phases["prefill"]
        prompts = prefill.times * size.prefill_batch / shards
        launches = phase.launches / steps
        return cls(
            chip, phase.apart(chip), weights, launches, slot, token, work.S, prefill.seconds(chip) / prompts
        )

    def prefill(self, sampled: Sampled) -> float:
        """Seconds of all prefills of a step."""
        return self.prompt_seconds * (sampled.prompts + sampled.repeated / self.prompt_tokens)

    def decode(self, sampled: Sampled) -> float:
        """Seconds of all decode steps."""
        total = 0.0
        for call in sampled.calls:
            read = (call.tokens + call.prompts * self.prompt_tokens) * self.token
            moved, flops, sending = (call.slots * cost for cost in self.slot)
            busy = self.chip.busy(flops, self.weights + moved + read, self.launches)
            total += call.steps * (self.apart * busy + sending) + look_seconds(call.rows)
        return total


def _training_seconds(
    work: Workload, setting: Setting, phases: Mapping[str, StepPhase], lengths: np.ndarray, chip: Chip
) -> dict[str, float]:
    """The seconds of scoring and of the updates, over the minibatches of a step."""
    seconds = {}
    minibatches = np.array_split(lengths, work.updates)
    for name in ("score", "update"):
        if phase := phases.get(name):
            parts = [_repacked(work, setting, phase, part, chip).seconds(chip) for part in minibatches]
            seconds[name] = float(np.mean(parts))
    return seconds


def _repacked(
    work: Workload, setting: Setting, phase: StepPhase, lengths: np.ndarray, chip: Chip
) -> StepPhase:
    """A phase of full responses with those of other lengths, packed into other rows."""
    S, T, update = work.S, work.T, phase.name == "update"
    prompts = np.full(len(lengths), S)
    pack = lambda sizes, **how: packed_size(prompts, sizes, S, T, setting.token_budget, setting.shards, **how)  # noqa: E731
    full = pack(np.full_like(lengths, T), exact=True)
    found = pack(lengths)
    runs = found.microbatches / full.microbatches
    tokens = runs * found.tokens / full.tokens
    attention = roofline.phase_attention(work, setting, phase.name)
    pairs = _pairs(work, found, lengths) / _pairs(work, full, np.full_like(lengths, T))
    once = roofline.updated_bytes(work, setting) if update else 0.0
    weights = work.itemsize * Sizes.of(work.model).decoder / setting.mesh.tensor
    weights = min(weights * full.microbatches * (4 if update else 1), phase.bytes - once)

    def scaled(e: Exchange) -> Exchange:
        if e.kind == "all-reduce" and e.devices == setting.mesh.tensor:  # activations
            return dataclasses.replace(e, bytes=e.bytes * tokens)
        return dataclasses.replace(e, bytes=e.bytes * (runs if e.times >= full.microbatches else 1))

    repacked = dataclasses.replace(
        phase,
        flops=(phase.flops - attention) * tokens + attention * pairs,
        bytes=once + weights * runs + (phase.bytes - once - weights) * tokens,
        launches=phase.launches * runs,
        exchanges=tuple(map(scaled, phase.exchanges)),
        busy=0.0,
    )
    return dataclasses.replace(repacked, busy=phase.apart(chip) * repacked.working(chip))


def _pairs(work: Workload, size: PackedSize, lengths: np.ndarray) -> float:
    """Query-key pairs of a layout, up to a constant factor."""
    if not work.kernels:  # masked pairs are computed too
        return float(size.microbatches * size.padded)
    n = lengths.astype(float)
    return float(size.splits * work.S**2 / 2 + (n * (work.S + n / 2)).sum())
