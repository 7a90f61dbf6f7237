"""`lpo plan`: whether a config fits into a slice, how long a step takes there, and which settings would be faster.

A setting is the meshes for training and for decoding, the tokens in a microbatch, rematerialisation, and the rows
sampled at once. The config's own setting is compiled phase by phase. Other settings are ranked by
`roofline.estimate_phases`, scaled by the ratio of compiled to estimated figures of the phases compiled so far, and the
best are compiled until one fits. With response lengths, they are ranked by the time of a step at these lengths.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lpo_jax.config import Config, override_config
from lpo_jax.errors import UserError
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.eight_bits import check_device
from lpo_jax.models.kernels import cudnn
from lpo_jax.models.kernels.choice import KERNELS_OF, best_on
from lpo_jax.models.placement import model_sizes
from lpo_jax.objectives import Objective
from lpo_jax.objectives.batch import Field
from lpo_jax.parallel import mesh as meshes
from lpo_jax.planner import roofline, topology
from lpo_jax.planner.at_lengths import AtLengths, at_lengths
from lpo_jax.planner.phases import SPARE, StepPhase
from lpo_jax.planner.setting import Setting, Workload
from lpo_jax.planner.sizes import Sizes
from lpo_jax.planner.topology import Chip, Topology
from lpo_jax.training.behaviour import choose_behaviour
from lpo_jax.training.check import check_config
from lpo_jax.training.learner import scores_first

# The phases with nearly all of the time and memory. Only these phases of a suggestion are compiled.
DECISIVE = ("update", "decode")
TRIES = 3  # the most suggestions that are compiled
SHORTLIST = 6  # meshes whose best setting at full length is simulated at other lengths
WITHOUT_FP8 = {"a100": 8.0}  # chips without 8-bit floats, and their CUDA compute capability


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A setting and the phases of a step with it.

    Attributes:
      setting: the setting.
      phases: the phases of a step, with every response at full length.
      compiled: the names of the phases that were compiled; the figures of the others are estimates.
      at_lengths: the step at the response lengths that the plan is for; None: there are none.
    """

    setting: Setting
    phases: tuple[StepPhase, ...]
    compiled: frozenset[str]
    at_lengths: AtLengths | None = None

    @property
    def memory(self) -> float:
        """The peak memory of one device during a step, in bytes."""
        return max(phase.memory for phase in self.phases)

    def seconds(self, chip: Chip) -> float:
        """Return the seconds of a step: at the given response lengths, with the faster cache, else at full length."""
        if self.at_lengths is None:
            return sum(phase.seconds(chip) for phase in self.phases)
        return self.at_lengths.best.step_seconds


Compiler = Callable[[Setting, str], StepPhase]  # compiles the named phase of a setting


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of planning a config on a slice.

    Attributes:
      topology: the slice.
      work: the sizes of a step.
      asked: the config's own setting.
      suggested: a better setting that fits, or None.
      with_int8: a setting that fits and is better still with int8 weights while sampling, or None.
      searched: whether a better setting was searched for.
      seconds: the time that planning took.
      lengths: `[P, K]` response tokens to plan for; None: all responses have their full length.
    """

    topology: Topology
    work: Workload
    asked: Proposal
    suggested: Proposal | None
    with_int8: Proposal | None
    searched: bool
    seconds: float
    lengths: np.ndarray | None = None

    def spare(self, proposal: Proposal) -> float:
        """Return the free bytes of a device; negative if the proposal does not fit."""
        return self.topology.chip.memory - proposal.memory

    def step_seconds(self, proposal: Proposal) -> float:
        """Return the seconds of a step at the hardware's limits, with every response at full length."""
        return sum(phase.seconds(self.topology.chip) for phase in proposal.phases)

    def gradient_ratio(self, proposal: Proposal) -> float:
        """Return the FLOPs of the compiled updates divided by their model FLOPs."""
        update = proposal.phases[-1]
        devices = proposal.setting.mesh.devices
        return update.flops * devices * self.work.updates / roofline.model_flops(self.work)

    def utilisation(self, proposal: Proposal) -> float:
        """Return the model FLOPs utilisation: those of sampling and updates over the peak of all devices."""
        sizes, work = Sizes.of(self.work.model), self.work
        sampled = 2.0 * (sizes.layers + sizes.head) * work.trained_tokens
        sampled += roofline.attention_flops(work, work.P)
        sampled += work.P * work.tower.flops if work.tower else 0.0
        peak = self.step_seconds(proposal) * self.topology.chip.peak * self.topology.num_devices
        return (roofline.model_flops(work) + sampled) / peak


def plan(
    config: Config,
    target: Topology,
    model: ModelConfig,
    eos_ids: tuple[int, ...],
    objective: Objective,
    *,
    lengths: np.ndarray | None = None,
    estimate: bool = False,
    suggest: bool = True,
    whole: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plan one step of a config on a slice.

    Args:
      config: the config.
      target: the slice.
      model: the model's config.
      eos_ids: every id that ends a response.
      objective: the objective.
      lengths: `[P, K]` response tokens of a step to plan for; None: all responses have their full length.
      estimate: whether to compile nothing, and estimate all phases by arithmetic.
      suggest: whether to search for a better setting.
      whole: whether to compile unrolled programs at full depth (see `programs`).
      report: called with a line about each program before it is compiled.

    Raises:
      UserError: the compiler is missing, the config's mesh does not fit the slice, or the chip lacks a data type.
    """
    started = time.perf_counter()
    chip = target.chip.name
    check_device(config.sampling.kv_dtype, chip, WITHOUT_FP8.get(chip, math.inf))
    may_round = allows_int8(config)
    config = choose_behaviour(config, objective).resolve(config)
    work = workload(config, model, objective.needs, scores_first(objective), target.chip)
    asked = setting_of(config, work, target)
    compiler: Compiler | None = None
    if not estimate:
        devices = topology.open_compiler(target)

        def compiler(setting: Setting, name: str) -> StepPhase:
            report(f"compiling {name} for {target.name}, {setting.describe()}")
            return compile_phase(
                config, model, eos_ids, objective, work, setting, devices, target, name, whole
            )

    search = _Search(work, target.chip, compiler, lengths)
    own = search.timed(search.propose(asked, None))
    better = with_int8 = None
    if suggest:
        scales = search.scales(own)
        found = list(settings(config, work, target))
        better = search.better(own, found, scales)
        if may_round:
            rounded = [dataclasses.replace(setting, int8=True) for setting in found]
            with_int8 = search.better(better or own, rounded, scales)
    return Plan(target, work, own, better, with_int8, suggest, time.perf_counter() - started, lengths)


def allows_int8(config: Config) -> bool:
    """Return whether int8 weights while sampling are a choice that the config leaves open."""
    if config.sampling.weights == "int8":
        return False
    try:
        check_config(override_config(config, ["--sampling.weights=int8"]))
    except UserError:
        return False
    return True


def workload(
    config: Config, model: ModelConfig, needs: frozenset[Field], scores_first: bool, chip: Chip
) -> Workload:
    """Return the sizes of one step on this chip; arguments as in `roofline.workload`."""
    work = roofline.workload(config, model, needs, scores_first)
    kernels = attention_of(config, chip, model) != "plain"
    return dataclasses.replace(work, kernels=kernels, platform=chip.kind)


def compile_phase(
    config: Config,
    model: ModelConfig,
    eos_ids: tuple[int, ...],
    objective: Objective,
    work: Workload,
    setting: Setting,
    devices: Sequence[object],
    target: Topology,
    name: str,
    whole: bool = False,
) -> StepPhase:
    """Compile a phase of the step with this setting; arguments as in `programs.Slice`."""
    from lpo_jax.planner.programs import Slice

    attention = attention_of(config, target.chip, model)
    chosen = override_config(config, [*setting.overrides(), f"--model.attention={attention}"])
    return Slice(chosen, model, eos_ids, objective, work, setting, devices, target, whole).phase(name)


def attention_of(config: Config, chip: Chip, model: ModelConfig) -> str:
    """Return the attention that a run on this chip has (`lpo_jax.models.kernels.choice`).

    Raises:
      UserError: the config demands kernels for other devices, or of a form that does not exist.
    """
    demanded, form = config.model.attention, (config.model.dtype, model.head_width, model.sliding_window)
    if demanded == "auto":
        return best_on(chip.kind, *form)[0]
    if demanded in KERNELS_OF and KERNELS_OF[demanded] != chip.kind:
        raise UserError(
            f"model.attention={demanded}: {chip.name} is not a {KERNELS_OF[demanded].upper()}; set auto"
        )
    if demanded == "cudnn" and (refused := cudnn.refuses(*form)):
        raise UserError(f"model.attention=cudnn: {refused}; set triton, or auto")
    return demanded


def setting_of(config: Config, work: Workload, target: Topology) -> Setting:
    """Return the config's own setting on a slice, with the mesh derived if it is not given.

    Raises:
      UserError: the mesh does not fit the slice, the model or the batch.
    """
    devices = config.mesh.devices or target.num_devices
    if devices > target.num_devices:
        raise UserError(
            f"mesh.devices = {devices}: {target.name} has {target.num_devices}; 0 uses all of them"
        )
    model, prompts, memory = model_sizes(work.model), work.P // work.updates, target.chip.memory
    state = meshes.STATE_BYTES[config.optimizer.state]
    sizes = meshes.choose_mesh(config.mesh, devices, model, prompts, memory, work.itemsize, state)
    # A run decides remat=auto by its free memory. The plan assumes recomputation, which needs less memory.
    training = config.training
    kv_tokens = config.sampling.kv_tokens if work.kernels else 0
    if sizes.data % target.hosts:
        raise UserError(
            f"mesh.data = {sizes.data}: {target.name} has {target.hosts} hosts, over which only the data axis is laid "
            f"out; set it to a multiple of {target.hosts}"
        )
    rows, int8 = config.sampling.max_rows, config.sampling.weights == "int8"
    asked = Setting(sizes, training.token_budget, bool(training.remat), rows, kv_tokens, int8, target.hosts)
    return dataclasses.replace(asked, rows=asked.capacity(work).slots)


def settings(config: Config, work: Workload, target: Topology) -> Iterator[Setting]:
    """Yield candidate settings: all meshes of the slice, some token budgets, remat or not, all rows or fewer."""
    model = model_sizes(work.model)
    n = config.mesh.devices or target.num_devices
    # A prompt with all, half, a quarter or one of its responses: it runs once with each part.
    split = lambda parts: work.S + -(-work.K // parts) * work.T  # noqa: E731
    group = split(1)
    budgets = sorted({split(work.K), split(4), split(2), group, 2 * group, 4 * group})
    for tensor, fsdp in itertools.product(meshes.divisors(min(n, 8)), meshes.divisors(n)):
        if n % (tensor * fsdp):
            continue
        keys = {"data": n // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}
        given = override_config(config, [f"--mesh.{key}={value}" for key, value in keys.items()])
        try:
            start = setting_of(given, work, target)
        except UserError:  # does not divide heads or prompts
            continue
        decoding = [
            dataclasses.replace(start.mesh, decode_tensor=n) for n in meshes.decode_sizes(start.mesh, model)
        ]
        for mesh, budget, remat in itertools.product(decoding, budgets, (True, False)):
            fewest = mesh.devices // mesh.decode_tensor * work.K
            rows = sorted({fewest * -(-work.P * work.K // (fewest * cut)) for cut in (1, 2, 4, 8, 16, 32)})
            for at_once in rows:
                yield Setting(mesh, budget, remat, at_once, int8=start.int8, hosts=target.hosts)


@dataclasses.dataclass
class _Scale:
    """The ratios of a compiled phase's figures to its estimate's, and its `StepPhase.apart`; 0 if kernels overlap."""

    flops: float = 1.0
    bytes: float = 1.0
    temporary: float = 1.0
    launches: float = 1.0
    apart: float = 0.0

    def __call__(self, phase: StepPhase, chip: Chip) -> StepPhase:
        numbers = {name: getattr(self, name) * getattr(phase, name) for name in _SCALED}
        scaled = dataclasses.replace(phase, **numbers)
        return dataclasses.replace(scaled, busy=self.apart * scaled.working(chip))

    @classmethod
    def between(cls, made: StepPhase, estimate: StepPhase, chip: Chip) -> "_Scale":
        ratio = lambda name: getattr(made, name) / max(getattr(estimate, name), 1.0)  # noqa: E731
        if made.too_large:
            return cls(temporary=ratio("temporary"))
        ratios = {name: ratio(name) for name in _SCALED}
        return cls(**ratios, apart=made.apart(chip) if made.busy else 0.0)


_SCALED = ("flops", "bytes", "temporary", "launches")


@dataclasses.dataclass(frozen=True)
class _Search:
    """The search for a better setting.

    Attributes:
      work: the sizes of a step.
      chip: the device.
      compiler: compiles phases; None: there are estimates only.
      lengths: as in `Plan`.
      made: what has been compiled.
    """

    work: Workload
    chip: Chip
    compiler: Compiler | None
    lengths: np.ndarray | None
    made: dict[tuple, StepPhase] = dataclasses.field(default_factory=dict)

    def compiled(self, compiler: Compiler, setting: Setting, name: str) -> StepPhase:
        """Compile a phase, unless it has been compiled; an update does not depend on how responses are sampled."""
        sampling = () if name == "update" else (setting,)
        key = name, setting.mesh, setting.token_budget, setting.remat, *sampling
        if key not in self.made:
            self.made[key] = compiler(setting, name)
        return self.made[key]

    def propose(self, setting: Setting, scales: dict[str, _Scale] | None, compiled: bool = True) -> Proposal:
        """Return a setting's phases: compiled if there is a compiler, with `scales` only the decisive ones."""
        phases, made_names = [], set()
        for phase in roofline.estimate_phases(self.work, setting):
            if compiled and self.compiler and (scales is None or phase.name in DECISIVE):
                made = self.compiled(self.compiler, setting, phase.name)
                if made.too_large:
                    made = dataclasses.replace(
                        phase, held=made.held, temporary=made.temporary, too_large=True
                    )
                phase = made
                made_names.add(phase.name)
            elif scales:
                phase = scales.get(phase.name, _Scale())(phase, self.chip)
            phases.append(phase)
        return Proposal(setting, tuple(phases), frozenset(made_names))

    def timed(self, proposal: Proposal) -> Proposal:
        """Return a proposal with its step at the lengths to plan for."""
        if self.lengths is None:
            return proposal
        found = at_lengths(self.work, proposal.setting, proposal.phases, self.lengths, self.chip)
        return dataclasses.replace(proposal, at_lengths=found)

    def better(self, known: Proposal, pool: list[Setting], scales: dict[str, _Scale]) -> Proposal | None:
        """Return the fastest setting that fits; None if it is no faster than the known one, and that fits.

        Args:
          known: the best proposal so far.
          pool: the settings; those that turn out not to fit are removed.
          scales: by phase; corrected by what is compiled.
        """
        fitting = known if known.memory <= self.chip.memory else None
        for _ in range(TRIES if self.compiler else 1):
            ranked = self._ranked(pool, scales)
            if not ranked or (fitting and ranked[0].seconds(self.chip) > 0.95 * fitting.seconds(self.chip)):
                return None
            best = self.timed(self.propose(ranked[0].setting, scales))
            if best.memory <= self.chip.memory:
                improves = fitting is None or best.seconds(self.chip) < fitting.seconds(self.chip)
                return best if improves else None
            pool.remove(best.setting)
            found = self.scales(best)
            for name in best.compiled:
                scales[name].temporary = max(scales[name].temporary, found[name].temporary)
        return None

    def _ranked(self, pool: list[Setting], scales: dict[str, _Scale]) -> list[Proposal]:
        """The proposals that fit, the fastest first. At given lengths, the best ones of each mesh at full length."""
        limit = (1 - SPARE) * self.chip.memory
        proposals = [self.propose(setting, scales, compiled=False) for setting in pool]
        ranked = sorted((p for p in proposals if p.memory <= limit), key=lambda p: p.seconds(self.chip))
        if self.lengths is None:
            return ranked
        first: dict[meshes.MeshSizes, Proposal] = {}
        for proposal in ranked:
            first.setdefault(proposal.setting.mesh, proposal)
        shortlist = list(first.values())[:SHORTLIST]
        return sorted(map(self.timed, shortlist), key=lambda p: p.seconds(self.chip))

    def scales(self, proposal: Proposal) -> dict[str, _Scale]:
        """Return the ratios of the compiled phases' figures to the estimates; 1 for the others."""
        pairs = zip(proposal.phases, roofline.estimate_phases(self.work, proposal.setting))
        return {
            made.name: _Scale.between(made, estimate, self.chip)
            if made.name in proposal.compiled
            else _Scale()
            for made, estimate in pairs
        }
