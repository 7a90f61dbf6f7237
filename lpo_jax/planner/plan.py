"""`lpo plan`: whether a config fits a slice that nobody has paid for yet, how long a step takes there, and what would
be better.

A plan weighs settings: mesh, tokens in a microbatch, rematerialisation, rows sampled at once. The config's own is
compiled phase by phase. Others are ranked by `roofline.estimate`, scaled by how the compiler's figures compare with
the estimate for what has been compiled so far, and the best is compiled until one holds.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from lpo_jax.config import Config, override_config
from lpo_jax.errors import UserError
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.placement import model_sizes
from lpo_jax.objectives import Objective
from lpo_jax.parallel import mesh as meshes
from lpo_jax.planner import roofline, topology
from lpo_jax.planner.roofline import Phase, Setting, Sizes, Workload
from lpo_jax.planner.topology import Topology
from lpo_jax.training.behaviour import choose_behaviour
from lpo_jax.training.learner import scores_first

# The phases that take nearly all of the time and of the memory: a suggestion is compiled in these.
DECISIVE = ("update", "decode")
TRIES = 3  # suggestions that are compiled at most
# Of a chip's memory, what a suggestion must leave: batches of uneven lengths need a little more than full ones.
SPARE = 0.03


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A setting with the phases of a step under it.

    Attributes:
      compiled: names of the phases whose figures are the compiler's; those of the others are estimates.
    """

    setting: Setting
    phases: tuple[Phase, ...]
    compiled: frozenset[str]

    @property
    def memory(self) -> float:
        """Bytes of one device at the worst moment of a step."""
        return max(phase.memory for phase in self.phases)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a config on a slice.

    Attributes:
      asked: the config's own setting; suggested: a better one that fits, if there is one.
      searched: whether one was looked for.
      seconds: that planning took.
    """

    topology: Topology
    work: Workload
    asked: Proposal
    suggested: Proposal | None
    searched: bool
    seconds: float

    def spare(self, proposal: Proposal) -> float:
        """Bytes that are left on a device; negative: that are lacking."""
        return self.topology.chip.memory - proposal.memory

    def step_seconds(self, proposal: Proposal) -> float:
        """Of a whole step at the hardware's limits, every response at full length."""
        return sum(phase.seconds(self.topology.chip) for phase in proposal.phases)

    def gradient_ratio(self, proposal: Proposal) -> float:
        """Compiled FLOPs of an update over what it cannot do without."""
        update = proposal.phases[-1]
        devices = proposal.setting.mesh.devices
        return update.flops * devices * self.work.updates / roofline.model_flops(self.work)

    def utilisation(self, proposal: Proposal) -> float:
        """Model FLOPs, of sampling and updates, over what all devices could do in the time of a step."""
        sizes, work = Sizes.of(self.work.model), self.work
        sampled = 2 * (sizes.layers + sizes.head) * work.trained_tokens + roofline.attention_flops(
            work, work.P
        )
        able = self.step_seconds(proposal) * self.topology.chip.peak * self.topology.num_devices
        return (roofline.model_flops(work) + sampled) / able


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
    """Plans one step of a config on a slice.

    Args:
      suggest: whether to look for a better setting too.
      whole: compile unrolled programs at full depth (see `programs`).
      report: told what is being compiled.

    Raises:
      UserError: libtpu is missing, or the config's mesh does not suit the slice.
    """
    started = time.perf_counter()
    config = choose_behaviour(config, objective).resolve(config)
    work = roofline.workload(config, model, objective.needs, scores_first(objective))
    asked = setting_of(config, work, target)
    compiler = None
    if target.chip.kind == "tpu":
        devices = topology.tpu_devices(target)
        from lpo_jax.planner.programs import Slice

        def compiler(setting: Setting, name: str) -> Phase:
            chosen = override_config(config, setting.overrides())
            if chosen.model.attention == "auto":  # what a run on a TPU would take
                chosen = override_config(chosen, ["--model.attention=pallas"])
            report(f"compiling {name} for {target.name}, {setting.describe()}")
            return Slice(chosen, model, eos_ids, objective, work, setting, devices, whole).phase(name)

    own = _propose(work, asked, compiler, None)
    better = _suggest(config, work, target, own, compiler) if suggest else None
    return Plan(target, work, own, better, suggest, time.perf_counter() - started)


def setting_of(config: Config, work: Workload, target: Topology) -> Setting:
    """What the config chooses for a slice, its mesh derived where it does not say.

    Raises:
      UserError: a mesh that does not suit the slice, the model or the batch.
    """
    devices = config.mesh.devices or target.num_devices
    if devices > target.num_devices:
        raise UserError(
            f"mesh.devices = {devices}: {target.name} has {target.num_devices}; 0 uses all of them"
        )
    sizes = meshes.choose(
        config.mesh,
        devices,
        model_sizes(work.model),
        work.P // work.updates,
        target.chip.memory,
        work.itemsize,
    )
    # remat=auto is decided where the memory is known; here it is taken to recompute, which is the safe side.
    training = config.training
    asked = Setting(sizes, training.token_budget, bool(training.remat), config.sampling.max_rows)
    return dataclasses.replace(asked, rows=asked.capacity(work).slots)


def settings(config: Config, work: Workload, target: Topology) -> Iterator[Setting]:
    """Settings worth weighing: all meshes of the slice, some budgets, remat or not, all or fewer rows at once."""
    n = config.mesh.devices or target.num_devices
    group, one = work.S + work.K * work.T, work.S + work.T
    budgets = sorted({one, max(group // 2, one), group, 2 * group, 4 * group})
    for tensor, fsdp in itertools.product(_divisors(min(n, 8)), _divisors(n)):
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


def _propose(work: Workload, setting: Setting, compiler, scales: dict[str, "_Scale"] | None) -> Proposal:
    """A setting's phases, compiled where there is a compiler; with `scales`, only the decisive ones."""
    phases, compiled = [], set()
    for phase in roofline.estimate(work, setting):
        if compiler and (scales is None or phase.name in DECISIVE):
            made = compiler(setting, phase.name)
            if made.too_large:
                phase = dataclasses.replace(phase, held=made.held, temporary=made.temporary, too_large=True)
            else:
                phase = made
            compiled.add(phase.name)
        elif scales:
            phase = scales[phase.name](phase)
        phases.append(phase)
    return Proposal(setting, tuple(phases), frozenset(compiled))


@dataclasses.dataclass
class _Scale:
    """How a compiled phase compares with its estimate."""

    flops: float = 1.0
    bytes: float = 1.0
    temporary: float = 1.0

    def __call__(self, phase: Phase) -> Phase:
        numbers = {name: scale * getattr(phase, name) for name, scale in vars(self).items()}
        return dataclasses.replace(phase, **numbers)

    @classmethod
    def between(cls, made: Phase, estimate: Phase) -> "_Scale":
        ratio = lambda name: getattr(made, name) / max(getattr(estimate, name), 1.0)  # noqa: E731
        if made.too_large:
            return cls(temporary=ratio("temporary"))
        return cls(*(ratio(field.name) for field in dataclasses.fields(cls)))


def _suggest(config: Config, work: Workload, target: Topology, own: Proposal, compiler) -> Proposal | None:
    """The fastest setting that fits, where it is faster than the config's own, or that one does not fit."""
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
    pairs = zip(proposal.phases, roofline.estimate(work, proposal.setting))
    return {
        made.name: _Scale.between(made, estimate) if made.name in proposal.compiled else _Scale()
        for made, estimate in pairs
    }


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def to_json(made: Plan) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes of one device, times in seconds."""
    chip = made.topology.chip

    def of(proposal: Proposal | None) -> dict[str, Any] | None:
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
                    "times": phase.times,
                    "flops": phase.flops,
                    "bytes": phase.bytes,
                    "sent": phase.sent,
                    "held": phase.held,
                    "temporary": phase.temporary,
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

    work = dataclasses.asdict(made.work)
    return {
        "topology": made.topology.name,
        "devices": made.topology.num_devices,
        "chip": dataclasses.asdict(chip),
        "parameters": Sizes.of(made.work.model).total,
        "work": work,
        "asked": of(made.asked),
        "suggested": of(made.suggested),
        "seconds_planning": made.seconds,
    }
