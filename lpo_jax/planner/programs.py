"""Ahead-of-time compilation of the programs of a training step, from shapes, for a slice that need not be present.

These are the same functions that a run calls (`sampling.decode`, `training.step`), lowered with the run's meshes and
`jax.ShapeDtypeStruct`s. Training scans its layers and is compiled at full depth. Sampling unrolls them. All layers are
alike, so its programs are compiled at two small depths and their figures are extrapolated linearly, which takes seconds
instead of minutes; `whole` compiles them at full depth.
"""

import collections
import dataclasses
import functools
import math
import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lpo_jax.config import Config
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.eight_bits import stored_dtype
from lpo_jax.models.placement import placed
from lpo_jax.models.prompt_images import PromptImages, abstract_images
from lpo_jax.models.runner import Groups, score
from lpo_jax.objectives import Objective, TokenStats
from lpo_jax.parallel import mesh as meshes
from lpo_jax.parallel import sharding
from lpo_jax.planner.cost import program_cost
from lpo_jax.planner.hlo import collectives, parse_hlo
from lpo_jax.planner.phases import Exchange, StepPhase
from lpo_jax.planner.roofline import moved_seconds, phase_attention
from lpo_jax.planner.setting import Setting, Workload
from lpo_jax.planner.topology import Topology
from lpo_jax.runs.state import TrainState
from lpo_jax.sampling import Sampling, kv_cache, page_pool
from lpo_jax.sampling import decode as sampler
from lpo_jax.sampling.calls import look_seconds
from lpo_jax.sampling.rows import image_outputs
from lpo_jax.training.model import TrainedModel
from lpo_jax.training.optimizer import Optimizer, make_optimizer, planned_updates
from lpo_jax.training.step import update
from lpo_jax.types import PyTree

DEPTHS = (2, 4)  # numbers of layers at which unrolled programs are compiled
# Options for GPUs: a plan reads the program before LLVM makes machine code of it, so that its optimisation is left out.
UNUSED_CODE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Compiles the phases of a step for the devices of a slice.

    Attributes:
      config: the config, with the choices of `setting`.
      model: the model's config.
      eos_ids: every id that ends a response.
      objective: the objective.
      work: the sizes of a step.
      setting: the setting.
      devices: the devices to compile for.
      target: what they are.
      whole: whether to compile unrolled programs at full depth.
    """

    config: Config
    model: ModelConfig
    eos_ids: tuple[int, ...]
    objective: Objective
    work: Workload
    setting: Setting
    devices: Sequence[jax.Device]
    target: Topology
    whole: bool = False

    def phase(self, name: str) -> StepPhase:
        """Compile one phase of the step: "layout", "vision", "prefill", "decode", "score" or "update"."""
        if name in ("score", "update"):
            return self._training(name)
        if self.whole or name == "vision":  # the tower scans its layers
            return self._sampling(name, self.model)
        few, more = (self._sampling(name, dataclasses.replace(self.model, num_layers=n)) for n in DEPTHS)
        return extrapolate(few, more, (self.model.num_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return meshes.build_mesh(self.setting.mesh, list(self.devices))

    @functools.cached_property
    def _decode_mesh(self) -> jax.sharding.Mesh:
        return sharding.decode_mesh(self._mesh, self.setting.mesh.decode_tensor)

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.model.dtype)

    @property
    def _stored(self) -> jnp.dtype:
        return stored_dtype(self.config.sampling.kv_dtype, self._dtype)

    @property
    def _int8(self) -> bool:
        return self.config.sampling.weights == "int8"

    @property
    def _optimizer(self) -> Optimizer:
        updates = planned_updates(self.config, self.objective, self.config.training.steps)
        return make_optimizer(self.config.optimizer, updates)

    def _state(self, model: ModelConfig) -> TrainState:
        """The abstract train state on the training mesh."""
        with sharding.using(self._mesh):
            return TrainedModel(self.config, model).abstract_state(self._optimizer, self.objective)

    def _at_rest(self, state: TrainState) -> TrainState:
        """What is in the memory of the devices while there are no updates."""
        return state.replace(opt_state=None) if self._optimizer.on_host else state

    def _weights(self, model: ModelConfig, state: TrainState):
        """The sampler's abstract weights on the decode mesh."""
        make = lambda params: sampler.decode_layout(model, params, self._dtype, self._int8)  # noqa: E731
        with sharding.using(self._decode_mesh):
            return placed(model, jax.eval_shape(make, state.policy))

    def _kv_cache(self, model: ModelConfig, sequences: int, tokens: int) -> kv_cache.KVCache:
        """An abstract KV cache on the decode mesh, sharded as `allocate` does it."""
        make = functools.partial(kv_cache.allocate, model, self._stored, sequences, tokens)
        place = functools.partial(self._placed, ("batch", "kv_heads", None, None))
        return jax.tree.map(place, jax.eval_shape(make))

    def _placed(self, axes: tuple[str | None, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """An abstract array with these logical axes on the decode mesh."""
        where = sharding.spec(self._decode_mesh, axes, x.shape)
        place = jax.sharding.NamedSharding(self._decode_mesh, where)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def _measure(self, *arguments, **options) -> StepPhase:
        return measure(*arguments, target=self.target, **options)

    def _images(self, prompts: int, shards: int) -> PromptImages | None:
        """Abstract images, one for each of these prompts; None for a model that reads text only."""
        work = self.work
        return abstract_images(self.model, prompts, work.S, work.image_tokens, shards) if work.tower else None

    def _outputs(self, weights: PyTree) -> jax.ShapeDtypeStruct | None:
        """The vision tower's abstract outputs for all prompts of a round."""
        if (images := self._images(self._seen, self.setting.decode_shards)) is None:
            return None
        run = functools.partial(image_outputs, self.model, dtype=self._dtype)
        return self._placed((None, None, None), jax.eval_shape(run, weights, images.rows))

    @property
    def _seen(self) -> int:
        """The number of prompts whose images the tower reads in one call of the sampler."""
        return self.work.P * (1 + self.work.ahead)

    def _sampling(self, name: str, model: ModelConfig) -> StepPhase:
        work, setting, dtype = self.work, self.setting, self._dtype
        kernels = phase_attention(dataclasses.replace(work, model=model), setting, name)
        size = setting.capacity(work)
        state = self._at_rest(self._state(model))
        with sharding.using(self._decode_mesh):
            if name == "layout":
                one = model, state.policy["layers"], _ints(), dtype, self._int8
                alive = state, self._weights(model, state)
                return self._measure(name, self.model.num_layers, sampler.decode_layer.lower(*one), alive)
            weights = self._weights(model, state)
            if name == "vision":
                images = self._images(self._seen, setting.decode_shards)
                lowered = image_outputs.lower(model, weights, images.rows, dtype)
                return self._measure(name, 1, lowered, (state, weights))
            outputs = self._outputs(weights)
            if work.kernels:
                return self._in_pages(name, model, weights, (state, outputs), kernels)
            prompt_kv = self._kv_cache(model, size.prompts, work.S)
            own_kv = self._kv_cache(model, size.slots, size.tokens)
            # If rows are queued, the prompts that are prefilled next are in memory too.
            coming = self._kv_cache(model, size.prefill_batch, work.S) if size.queued else []
            if name == "prefill":
                lowered = self._prefill(model, weights, size.prefill_batch, outputs)
                alive = (state, weights, outputs) + ((prompt_kv, own_kv) if size.queued else ())  # type: ignore[assignment]
                return self._measure(name, setting.prefills(work), lowered, alive, kernels)
            rows = sampler.DecodeState(  # type: ignore[misc]
                *(_ints(size.slots) for _ in range(4)),
                active=jax.ShapeDtypeStruct((size.slots,), bool),
                keys=jax.ShapeDtypeStruct((size.slots, 2), jnp.uint32),
                members=_ints(size.prompts, work.K) if size.queued else None,
                member_index=_ints(size.slots) if size.queued else None,
            )
            settings = self._decode_settings(model)
            arguments = weights, rows, _ints(size.prompts), prompt_kv, own_kv
            lowered = sampler.decode.lower(settings, *arguments, _ints(), _ints(), _ints())
            alive = state, arguments, coming, outputs  # type: ignore[assignment]
            turns = setting.call_tokens(work)
            phase = self._measure(name, setting.calls(work), lowered, alive, kernels, turns)
        # The program was compiled for a response cache of full length, which grows with the responses.
        unread = (1 - work.mean_cached / size.tokens) * _bytes(own_kv)
        least = (1 - unread / _bytes((own_kv, prompt_kv))) * phase.bytes
        return self._reading(phase, max(phase.bytes - turns * unread, least))

    def _reading(self, phase: StepPhase, moved: float) -> StepPhase:
        """A decode phase that moves fewer bytes than its program says, with the looks of the host."""
        spared = self.target.chip.busy(0.0, phase.bytes - moved, 0.0)
        busy, host = max(phase.busy - spared, 0.0), look_seconds(self.setting.rows)
        return dataclasses.replace(phase, bytes=moved, busy=busy, host=host)

    def _decode_settings(self, model: ModelConfig) -> sampler.DecodeSettings:
        distribution, attention = Sampling(self.config.sampling.temperature), self.config.model.attention
        kv_dtype, tokens = self.config.sampling.kv_dtype, self.setting.call_tokens(self.work)
        return sampler.DecodeSettings(
            model, self.eos_ids, distribution, self._dtype, attention, kv_dtype, tokens
        )

    def _prefill(
        self, model: ModelConfig, weights: PyTree, prompts: int, outputs: jax.ShapeDtypeStruct | None
    ) -> jax.stages.Lowered:
        """The prefill of so many prompts, with the vision tower's outputs for those of the round."""
        images = self._images(prompts, 1)
        images = images and images.replace(rows=None)
        arguments = weights, _ints(prompts, self.work.S), _ints(prompts), images, outputs
        attention = self.config.model.attention
        return kv_cache.prefill.lower(model, self._dtype, self._stored, attention, *arguments)

    def _in_pages(
        self,
        name: str,
        model: ModelConfig,
        weights: PyTree,
        kept: tuple[TrainState, jax.ShapeDtypeStruct | None],
        kernels: float,
    ) -> StepPhase:
        """Prefill or decode with the kernels, whose KV cache is in pages; `kept` is in memory besides: the state, and
        the vision tower's outputs."""
        work, setting, shards = self.work, self.setting, self.setting.decode_shards
        size = setting.pool(work)
        R, U, batch = (shards * n for n in (size.slots, size.prompts, max(1, size.slots // work.K)))
        make = functools.partial(
            page_pool.allocate_pool, model, self._stored, shards * size.pages, size.page_size
        )
        pool = jax.tree.map(
            functools.partial(self._placed, ("batch", None, "kv_heads", None, None)), jax.eval_shape(make)
        )
        if name == "prefill":
            lowered = self._prefill(model, weights, batch, kept[1])
            return self._measure(name, setting.prefills(work), lowered, (kept, weights, pool), kernels)
        rows = sampler.DecodeState(  # type: ignore[misc]
            *(_ints(R) for _ in range(4)),
            active=jax.ShapeDtypeStruct((R,), bool),
            keys=jax.ShapeDtypeStruct((R, 2), jnp.uint32),
            members=_ints(U, min(work.K, size.slots)),
            member_index=_ints(R),
        )
        tables = _ints(U, max(1, size.pages_of(work.S - 1))), _ints(R, size.pages_of(work.T))
        lowered = sampler.decode_pages.lower(
            self._decode_settings(model), weights, rows, _ints(U), *tables, pool, _ints(), _ints()
        )
        coming = self._kv_cache(model, batch, work.S)  # prompts that are prefilled next
        turns, alive = setting.call_tokens(work), (kept, weights, rows, pool, coming)
        phase = self._measure(name, setting.calls(work), lowered, alive, kernels, turns)
        # A kernel counts as reading the whole pool, once for prompts and once for rows. It reads the tokens that rows
        # have so far, of which the last page is half full on average, and only the prompts that have active rows.
        live = setting.tokens_read(work) / size.page_size + size.slots / 2
        unread = (2 - min(live / size.pages, 1)) * _bytes(pool)
        return self._reading(phase, phase.bytes - turns * unread)

    def _training(self, name: str) -> StepPhase:
        work, state = self.work, self._state(self.model)
        with sharding.using(self._mesh):
            trained = TrainedModel(self.config, self.model)
            runner = trained.runner(self.config.sampling.temperature, self.objective)
            P = work.P // work.updates
            images = self._images(P, self.setting.shards)
            groups = Groups(_ints(P, work.S), _ints(P), _ints(P, work.K, work.T), images=images)
            if name == "score":
                times, lowered = self.setting.scorings(work), score.lower(runner, state.policy, groups)
            else:
                cotangent = TokenStats(jax.ShapeDtypeStruct((P, work.K, work.T), jnp.float32))
                times = work.updates
                lowered = update.lower(runner, self._optimizer, state, groups, cotangent)
        # Hooks may sample until the first update, so the sampler's weights are in memory while responses are scored.
        alive = (self._at_rest(state), self._weights(self.model, state)) if name == "score" else state
        phase = self._measure(name, times, lowered, alive, phase_attention(work, self.setting, name))
        host = moved_seconds(work, self.setting) if name == "update" else 0.0
        return dataclasses.replace(phase, host=host)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def extrapolate(few: StepPhase, more: StepPhase, steps: float) -> StepPhase:
    """Extrapolate linearly: the phase at `steps` times the distance from `few` to `more`."""
    line = lambda a, b: max(a + steps * (b - a), 0.0)  # noqa: E731

    def totals(phase: StepPhase) -> dict[tuple[str, int, int], tuple[float, float]]:
        found: dict[tuple[str, int, int], tuple[float, float]] = collections.defaultdict(lambda: (0.0, 0.0))
        for e in phase.exchanges:
            size, times = found[e.kind, e.devices, e.hosts]
            found[e.kind, e.devices, e.hosts] = size + e.bytes * e.times, times + e.times
        return found

    exchanges = []
    ends = totals(few), totals(more)
    for key in sorted({**ends[0], **ends[1]}):
        size, times = (line(*pair) for pair in zip(ends[0][key], ends[1][key]))
        kind, devices, hosts = key
        times = max(round(times), 1)
        exchanges.append(Exchange(kind, size / times, devices, times, hosts))
    names = ("flops", "bytes", "held", "temporary", "launches", "busy")
    numbers = {name: line(getattr(few, name), getattr(more, name)) for name in names}
    compiling = few.seconds_compiling + more.seconds_compiling
    return dataclasses.replace(more, **numbers, exchanges=tuple(exchanges), seconds_compiling=compiling)


def measure(
    name: str,
    times: int,
    lowered: jax.stages.Lowered,
    alive: object,
    kernels: float = 0.0,
    open_iterations: int = 1,
    *,
    target: Topology,
) -> StepPhase:
    """Compile a program, and read its memory, FLOPs, traffic and communication in one run.

    Args:
      name: the name of the phase.
      times: how often it runs in a step.
      lowered: the program.
      alive: abstract arrays that are in memory while it runs, with its arguments.
      kernels: matrix FLOPs of its Pallas kernels and of cuDNN, which the text does not contain.
      open_iterations: assumed iterations of loops whose number depends on data.
      target: the devices that it is compiled for.
    """
    chip, gpu = target.chip, target.chip.kind == "gpu"
    started, held = time.perf_counter(), _bytes(alive)
    try:
        compiled = lowered.compile(compiler_options=UNUSED_CODE if gpu else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        arguments = _bytes(lowered.args_info)
        return StepPhase(name, times, 0.0, 0.0, held, _needed(str(error), arguments), too_large=True)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    program = parse_hlo(text, open_iterations)
    cost = program_cost(program, seconds=chip.busy) if gpu else program_cost(program)
    kernels *= cost.kernels > 0  # without kernels, attention is in the text
    attending = max(
        kernels / (chip.attention_share * chip.peak), cost.kernels / (chip.bandwidth_share * chip.bandwidth)
    )
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return StepPhase(
        name,
        times,
        cost.flops + kernels,
        cost.bytes,
        held,
        memory.temp_size_in_bytes + fresh + memory.generated_code_size_in_bytes,
        tuple(
            Exchange(c.kind, c.bytes, c.devices, c.times, c.hosts(target.devices_per_host))
            for c in collectives(program)
        ),
        launches=cost.launches,
        busy=cost.busy + attending if gpu else 0.0,
        seconds_compiling=time.perf_counter() - started,
    )


def _needed(complaint: str, arguments: float) -> float:
    """Bytes of temporaries that a program would have needed, from the compiler's error message."""
    size = r"([\d.]+)([KMGT])"
    number = lambda match: float(match[1]) * 1024 ** (1 + "KMGT".index(match[2]))  # noqa: E731
    if used := re.search(rf"Used {size} of", complaint):  # everything in memory
        return number(used) - arguments
    return number(re.search(rf"temporaries \({size}\)", complaint))


def _bytes(tree: object) -> float:
    """The size of abstract arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        place = getattr(leaf, "sharding", None)
        total += math.prod(place.shard_shape(leaf.shape) if place else leaf.shape) * leaf.dtype.itemsize
    return float(total)
