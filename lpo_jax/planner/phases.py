"""A part of a training step, described by the work of each device."""

import dataclasses

from lpo_jax.planner.topology import Chip


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective that runs `times` in one run of a phase, each with a result of `bytes` on one of `devices`."""

    kind: str
    bytes: float
    devices: int
    times: int

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
        return {
            "arithmetic": self.flops / chip.peak,
            "memory": self.bytes / chip.bandwidth,
            "network": self.sent / chip.ring,
        }

    def seconds(self, chip: Chip) -> float:
        """Return the seconds of all its runs in a step, at the hardware's limits."""
        shares = self.shares(chip)
        return self.times * (max(shares["arithmetic"], shares["memory"]) + shares["network"])
