"""`lpo plan`: whether a config fits into a slice, how long a step takes there, and which settings would be faster.

A setting is a mesh, the tokens in a microbatch, rematerialisation, and the rows sampled at once. The config's own
setting is compiled phase by phase. Other settings are ranked by `roofline.estimate_phases`, scaled by the ratio of
compiled to estimated figures of the phases compiled so far, and the best are compiled until one fits.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

from lpo_jax.config import Config, override_config
from lpo_jax.errors import UserError
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.placement import model_sizes
from lpo_jax.objectives import Objective
from lpo_jax.parallel import mesh as meshes
from lpo_jax.planner import roofline, topology
from lpo_jax.planner.roofline import Setting, Sizes, StepPhase, Workload
from lpo_jax.planner.topology import Topology
from lpo_jax.training.behaviour import choose_behaviour
from lpo_jax.training.learner import scores_first
from lpo_jax.types import Json

# The phases with nearly all of the time and memory. Only these phases of a suggestion are compiled.
DECISIVE = ("update", "decode")
TRIES = 3  # the most suggestions that are compiled
# The share of a chip's memory that a suggestion leaves free, because batches of uneven lengths need a little more than
# full ones.
SPARE = 0.03


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A setting and the phases of a step with it.

    Attributes:
      setting: the setting.
      phases: the phases of a step.
      compiled: the names of the phases that were compiled; the figures of the others are estimates.
    """

    setting: Setting
    phases: tuple[StepPhase, ...]
    compiled: frozenset[str]

    @property
    def memory(self) -> float:
        """The peak memory of one device during a step, in bytes."""
        return max(phase.memory for phase in self.phases)


Compiler = Callable[[Setting, str], StepPhase]  # compiles the named phase of a setting


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of planning a config on a slice.

    Attributes:
      topology: the slice.
      work: the sizes of a step.
      asked: the config's own setting.
      suggested: a better setting that fits, or None.
      searched: whether a better setting was searched for.
      seconds: the time that planning took.
    """

    topology: Topology
    work: Workload
    asked: Proposal
    suggested: Proposal | None
    searched: bool
    seconds: float

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
        peak = self.step_seconds(proposal) * self.topology.chip.peak * self.topology.num_devices
        return (roofline.model_flops(work) + sampled) / peak


def plan(
    config: Config,
    target: Topology,
    model: ModelConfig,
    eos_ids: tuple[int, ...],
    objective: Objective,
    *,
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
      suggest: whether to search for a better setting.
      whole: whether to compile unrolled programs at full depth (see `programs`).
      report: called with a line about each program before it is compiled.

    Raises:
      UserError: libtpu is missing, or the config's mesh does not fit the slice.
    """
    started = time.perf_counter()
    config = choose_behaviour(config, objective).resolve(config)
    work = roofline.workload(config, model, objective.needs, scores_first(objective))
    asked = setting_of(config, work, target)
    compiler: Compiler | None = None
    if target.chip.kind == "tpu":
        devices = topology.tpu_devices(target)
        from lpo_jax.planner.programs import Slice

        def compiler(setting: Setting, name: str) -> StepPhase:
            chosen = override_config(config, setting.overrides())
            if chosen.model.attention == "auto":  # the choice of a run on a TPU
                chosen = override_config(chosen, ["--model.attention=pallas"])
            report(f"compiling {name} for {target.name}, {setting.describe()}")
            return Slice(chosen, model, eos_ids, objective, work, setting, devices, whole).phase(name)

    own = _propose(work, asked, compiler, None)
    better = _suggest(config, work, target, own, compiler) if suggest else None
    return Plan(target, work, own, better, suggest, time.perf_counter() - started)


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
    sizes = meshes.choose_mesh(config.mesh, devices, model, prompts, memory, work.itemsize)
    # A run decides remat=auto by its free memory. The plan assumes recomputation, which needs less memory.
    training = config.training
    asked = Setting(sizes, training.token_budget, bool(training.remat), config.sampling.max_rows)
    return dataclasses.replace(asked, rows=asked.capacity(work).slots)


def settings(config: Config, work: Workload, target: Topology) -> Iterator[Setting]:
    """Yield candidate settings: all meshes of the slice, some token budgets, remat or not, all rows or fewer."""
    n = config.mesh.devices or target.num_devices
    group, one = work.S + work.K * work.T, work.S + work.T
    budgets = sorted({one, max(group // 2, one), group, 2 * group, 4 * group})
    for tensor, fsdp in itertools.product(meshes.divisors(min(n, 8)), meshes.divisors(n)):
        if n % (tensor * fsdp):
            continue
        keys = {"data": n // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}
        given = override_config(config, [f"--mesh.{key}={value}" for key, value in keys.items()])
        try:
            start = setting_of(given, work, target)
        except UserError:  # does not divide heads or prompts
            continue
        fewest = start.mesh.devices // start.mesh.decode_tensor * work.K
        rows = sorted({fewest * -(-work.P * work.K // (fewest * cut)) for cut in (1, 2, 4, 8, 16, 32)})
        for budget, remat, at_once in itertools.product(budgets, (True, False), rows):
            yield dataclasses.replace(start, token_budget=budget, remat=remat, rows=at_once)


def _propose(
    work: Workload, setting: Setting, compiler: Compiler | None, scales: dict[str, "_Scale"] | None
) -> Proposal:
    """Return a setting's phases, compiled if there is a compiler; with `scales`, only the decisive ones."""
    phases, compiled = [], set()
    for phase in roofline.estimate_phases(work, setting):
        if compiler and (scales is None or phase.name in DECISIVE):
            made = compiler(setting, phase.name)
            if made.too_large:
                made = dataclasses.replace(phase, held=made.held, temporary=made.temporary, too_large=True)
            phase = made
            compiled.add(phase.name)
        elif scales:
            phase = scales[phase.name](phase)
        phases.append(phase)
    return Proposal(setting, tuple(phases), frozenset(compiled))


@dataclasses.dataclass
class _Scale:
    """The ratios of a compiled phase's figures to its estimate's."""

    flops: float = 1.0
    bytes: float = 1.0
    temporary: float = 1.0

    def __call__(self, phase: StepPhase) -> StepPhase:
        numbers = {name: scale * getattr(phase, name) for name, scale in vars(self).items()}
        return dataclasses.replace(phase, **numbers)

    @classmethod
    def between(cls, made: StepPhase, estimate: StepPhase) -> "_Scale":
        ratio = lambda name: getattr(made, name) / max(getattr(estimate, name), 1.0)  # noqa: E731
        if made.too_large:
            return cls(temporary=ratio("temporary"))
        return cls(*(ratio(field.name) for field in dataclasses.fields(cls)))


def _suggest(
    config: Config, work: Workload, target: Topology, own: Proposal, compiler: Compiler | None
) -> Proposal | None:
    """Return the fastest setting that fits; None unless it is faster than the config's own, or that does not fit."""
    limit = (1 - SPARE) * target.chip.memory
    seconds = lambda proposal: sum(phase.seconds(target.chip) for phase in proposal.phases)  # noqa: E731
    scales = _scales(work, own)
    fitting = own if own.memory <= target.chip.memory else None
    pool = list(settings(config, work, target))
    for _ in range(TRIES if compiler else 1):
        ranked = [_propose(work, setting, None, scales) for setting in pool]
        ranked = sorted((p for p in ranked if p.memory <= limit), key=seconds)
        if not ranked or (fitting and seconds(ranked[0]) > 0.95 * seconds(fitting)):
            return None
        best = _propose(work, ranked[0].setting, compiler, scales)
        if best.memory <= target.chip.memory:
            return best if fitting is None or seconds(best) < seconds(fitting) else None
        pool.remove(best.setting)
        found = _scales(work, best)
        for name in best.compiled:
            scales[name].temporary = max(scales[name].temporary, found[name].temporary)
    return None


def _scales(work: Workload, proposal: Proposal) -> dict[str, _Scale]:
    pairs = zip(proposal.phases, roofline.estimate_phases(work, proposal.setting))
    return {
        made.name: _Scale.between(made, estimate) if made.name in proposal.compiled else _Scale()
        for made, estimate in pairs
    }


_NUMBERS = ("times", "flops", "bytes", "sent", "held", "temporary")


def to_json(made: Plan) -> dict[str, Json]:
    """Convert a plan to plain values; sizes are bytes on one device, and times are seconds."""
    chip = made.topology.chip

    def of(proposal: Proposal | None) -> dict[str, Json] | None:
        if proposal is None:
            return None
        return {
            "overrides": proposal.setting.overrides(),
            "mesh": dataclasses.asdict(proposal.setting.mesh),
            "memory": proposal.memory,
            "spare": made.spare(proposal),
            "fits": made.spare(proposal) >= 0,
            "standing": roofline.standing(made.work, proposal.setting),
            "phases": [
                {
                    "name": phase.name,
                    "compiled": phase.name in proposal.compiled,
                    **{name: getattr(phase, name) for name in _NUMBERS},
                    "seconds": phase.seconds(chip),
                    "too_large": phase.too_large,
                    "exchanges": [dataclasses.asdict(e) | {"sent": e.sent} for e in phase.exchanges],
                }
                for phase in proposal.phases
            ],
            "seconds_per_step": made.step_seconds(proposal),
            "tokens_per_second": made.work.trained_tokens / made.step_seconds(proposal),
            "mfu": made.utilisation(proposal),
            "gradient_flops_ratio": made.gradient_ratio(proposal),
        }

    return {
        "topology": made.topology.name,
        "devices": made.topology.num_devices,
        "chip": dataclasses.asdict(chip),
        "parameters": Sizes.of(made.work.model).total,
        "work": dataclasses.asdict(made.work),
        "asked": of(made.asked),
        "suggested": of(made.suggested),
        "seconds_planning": made.seconds,
    }
