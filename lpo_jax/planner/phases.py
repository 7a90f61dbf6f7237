"""The phases of a step: the work of one device in each of them, and the time that it takes on a chip."""

import dataclasses

from lpo_jax.planner.topology import Chip

# The share of a chip's memory that a suggestion leaves free, because batches of uneven lengths need a little more than
# full ones.
SPARE = 0.03


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective that runs `times` in one run of a phase, each with a result of `bytes` on one of `devices`.

    The devices are on `hosts` that a network connects.
    """

    kind: str
    bytes: float
    devices: int
    times: int
    hosts: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each device of a ring sends in one run of the phase."""
        others = max(self.devices - 1, 0)
        share = others / max(self.devices, 1)
        of = {"all-reduce": 2 * share, "reduce-scatter": others, "all-gather": share, "all-to-all": share}
        return of.get(self.kind, 1.0) * self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class StepPhase:
    """A part of a step, on one device.

    Attributes:
      name: its name.
      times: how often it runs in a step; all other figures are those of one run.
      flops: FLOPs of matrix products, with recomputed ones.
      bytes: bytes moved between memory and chip.
      held: bytes in memory before, during and after a run: parameters, optimizer, weights, KV cache.
      temporary: bytes that it needs in addition.
      exchanges: its collectives.
      host: seconds in which the device waits for the host.
      launches: kernels that it starts.
      busy: seconds of its kernels one after another; 0: kernels overlap, or it is an estimate.
      seconds_compiling: the time that compilation took; 0 for an estimate.
      too_large: whether the compiler refused it because of its memory, so that nothing else is known.
    """

    name: str
    times: int
    flops: float
    bytes: float
    held: float
    temporary: float
    exchanges: tuple[Exchange, ...] = ()
    launches: float = 0.0
    busy: float = 0.0
    host: float = 0.0
    seconds_compiling: float = 0.0
    too_large: bool = False

    @property
    def memory(self) -> float:
        return self.held + self.temporary

    @property
    def sent(self) -> float:
        """Bytes that a device sends to others in one run."""
        return sum(exchange.sent for exchange in self.exchanges)

    def shares(self, chip: Chip) -> dict[str, float]:
        """Return the seconds that each resource is busy in one run."""
        sent = sum(e.sent / chip.link_rate(e.devices, e.hosts) for e in self.exchanges)
        return chip.shares(self.flops, self.bytes, self.launches) | {"network": sent}

    def working(self, chip: Chip) -> float:
        """Return the seconds of one run without communication."""
        return self.busy or chip.busy(self.flops, self.bytes, self.launches)

    def apart(self, chip: Chip) -> float:
        """Return how much longer its kernels take one after another than if they overlapped."""
        return self.working(chip) / max(chip.busy(self.flops, self.bytes, self.launches), 1e-12)

    def seconds(self, chip: Chip) -> float:
        """Return the seconds of all its runs in a step, at the limits of the hardware that `Chip` states."""
        return self.times * (self.working(chip) + self.shares(chip)["network"] + self.host)
