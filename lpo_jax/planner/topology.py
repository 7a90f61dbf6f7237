"""Specifications of accelerators, and topologies to compile for that need not be present.

`v5p:4x4x4` is a slice of 64 TPU v5p, and `h100:8` is eight GPUs. libtpu describes a TPU slice and compiles for it on
any machine. For GPUs there is no such compiler, so their plans are arithmetic alone.
"""

import dataclasses
import importlib.util
import math
import os
import re

from lpo_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """The specification of one device.

    Attributes:
      name: its name in `--topology`.
      kind: "tpu" or "gpu".
      memory: bytes that a program can use: for a TPU the limit of its compiler, for a GPU the nominal size less about
        5% for driver and allocator.
      peak: dense bfloat16 operations per second.
      bandwidth: bytes per second between memory and chip.
      link: bytes per second of one link to a neighbour, in one direction; for a GPU the sum of its NVLinks.
      axes: the dimensions of the torus; 0: all devices are connected by a switch.
      per_host: devices of one host.
      pod: the largest number of connected devices.
    """

    name: str
    kind: str  # "tpu" | "gpu"
    memory: float
    peak: float
    bandwidth: float
    link: float
    axes: int
    per_host: int
    pod: int

    @property
    def ring(self) -> float:
        """Bytes per second that a device sends in a ring: both directions of one torus axis, or the switch."""
        return 2 * self.link if self.axes else self.link


# TPU: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, "system architecture" tables. The bandwidth of a link in one
# direction is the bidirectional bandwidth of a chip divided by twice its ports (4 on a 2D torus, 6 on a 3D one). The
# memory is the capacity that the compiler of libtpu 0.0.52 reports when a program exceeds it.
# GPU: NVIDIA data sheets of A100 SXM 80GB, H100 SXM and H200 SXM, without sparsity; NVLink in one direction.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 15.75 * 2**30, 197e12, 819e9, 50e9, 2, 8, 256),
        Chip("v5p", "tpu", 95.74 * 2**30, 459e12, 2765e9, 100e9, 3, 4, 6144),
        Chip("v6e", "tpu", 31.25 * 2**30, 918e12, 1638e9, 100e9, 2, 8, 256),
        Chip("a100", "gpu", 0.95 * 80e9, 312e12, 2039e9, 300e9, 0, 8, 8),
        Chip("h100", "gpu", 0.95 * 80e9, 989e12, 3350e9, 450e9, 0, 8, 8),
        Chip("h200", "gpu", 0.95 * 141e9, 989e12, 4800e9, 450e9, 0, 8, 8),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of equal chips; `shape` is that of the torus, or the number of GPUs."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """Parse a topology such as `v5p:4x4x4` or `h100:8`.

    Raises:
      UserError: the name has another form, the chip is unknown, or it does not come in this shape.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name.strip().lower())
    if not match:
        raise UserError(
            f"--topology {name!r}: write chip:shape, such as v5p:4x4x4 or h100:8; chips: {_known()}"
        )
    chip = CHIPS.get(match[1])
    if chip is None:
        raise UserError(
            f"--topology {name!r}: unknown chip {match[1]!r}{nearest(match[1], CHIPS)}; known: {_known()}"
        )
    shape = tuple(int(size) for size in match[2].split("x"))
    devices = math.prod(shape)
    if len(shape) != max(chip.axes, 1):
        example = {0: "8", 2: "4x4", 3: "2x2x4"}[chip.axes]
        raise UserError(
            f"--topology {name!r}: {chip.name} needs {max(chip.axes, 1)} numbers, e.g. {chip.name}:{example}"
        )
    if not 1 <= devices <= chip.pod:
        limit, advice = ("host", "") if chip.kind == "gpu" else ("pod", "; plan one slice of it")
        raise UserError(
            f"--topology {name!r}: {devices} devices, but a {limit} has at most {chip.pod}{advice}"
        )
    return Topology(chip, shape)


def tpu_devices(topology: Topology) -> list[object]:
    """Return the devices of a TPU slice to compile for. No TPU is needed, and none is searched for.

    Raises:
      UserError: libtpu is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for a TPU compiles with libtpu, which is not installed; run: pip install 'lpo_jax[plan]'"
        )
    # Without these variables, libtpu queries the metadata server of a Google machine and takes the lock of the TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{topology.chip.name}-{topology.num_devices}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    import jax
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise UserError(f"--topology {topology.name!r}: libtpu has no such slice ({reason})") from None


def _known() -> str:
    return ", ".join(CHIPS)
