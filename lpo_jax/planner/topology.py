"""Specifications of accelerators, and topologies to compile for that need not be present.

`v5p:4x4x4` is a slice of 64 TPU v5p, `h100:8` is a host with eight GPUs, and `2x h100:8` is two such hosts. libtpu
describes a TPU slice, and the files in `gpus/` describe GPUs to the CUDA plugin of JAX; both compile on any machine.
"""

import dataclasses
import importlib.util
import math
import os
import re
from importlib import resources

from lpo_jax.errors import UserError, nearest
from lpo_jax.parallel import gpus


@dataclasses.dataclass(frozen=True)
class Chip:
    """The specification of one device.

    Attributes:
      name: its name in `--topology`.
      kind: "tpu" or "gpu".
      memory: bytes that a program can use: for a TPU the limit of its compiler, for a GPU the share of the memory that
        JAX's allocator takes (`lpo_jax.parallel.gpus`).
      peak: dense bfloat16 operations per second.
      bandwidth: bytes per second between memory and chip.
      link: bytes per second of one link to a neighbour, in one direction; for a GPU the sum of its NVLinks.
      axes: the dimensions of the torus; 0: all devices of a host are connected by a switch.
      per_host: devices of one host.
      pod: the largest number of connected devices.
      network: bytes per second of a device to other hosts, in one direction; 0: hosts of a pod have no other links.
      peak_share: the part of `peak` that large matrix products are assumed to reach.
      bandwidth_share: the part of `bandwidth` that programs are assumed to reach.
      attention_share: the part of `peak` that attention kernels are assumed to reach.
      launch: seconds that a kernel is assumed to take at least; 0: operations overlap, and only their sums count.
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
    network: float = 0.0
    peak_share: float = 1.0
    bandwidth_share: float = 1.0
    attention_share: float = 1.0
    launch: float = 0.0

    @property
    def ring(self) -> float:
        """Bytes per second that a device sends in a ring: both directions of one torus axis, or the switch."""
        return 2 * self.link if self.axes else self.link

    def link_rate(self, devices: int, hosts: int) -> float:
        """Return the bytes per second that a device sends in a collective of `devices` on `hosts`.

        A ring between hosts is divided into one per network adapter, of which a host has as many as devices.
        """
        return self.ring if hosts <= 1 else min(self.ring, devices / hosts * self.network)

    def shares(self, flops: float, moved: float, launches: float = 0.0) -> dict[str, float]:
        """Return the seconds that arithmetic, memory and the start of kernels take, at the assumed shares."""
        return {
            "arithmetic": flops / (self.peak_share * self.peak),
            "memory": moved / (self.bandwidth_share * self.bandwidth),
            "launches": launches * self.launch,
        }

    def busy(self, flops: float, moved: float, launches: float = 1.0) -> float:
        """Return the seconds of a kernel, or of several that overlap: those of what takes longest."""
        return max(self.shares(flops, moved, launches).values())


# What one H200 reached (docs/performance.md, "One NVIDIA H200"). Other GPUs are assumed to reach the same parts of what
# is specified.
_MEASURED = {"peak_share": 0.65, "bandwidth_share": 0.68, "attention_share": 0.37, "launch": 3e-6}


def _gpu(name: str, memory: int, peak: float, bandwidth: float, link: float, network: float) -> Chip:
    return Chip(
        name, "gpu", gpus.MEMORY_SHARE * memory, peak, bandwidth, link, 0, 8, 8, network=network, **_MEASURED
    )


# TPU: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, "system architecture" tables. The bandwidth of a link in one
# direction is the bidirectional bandwidth of a chip divided by twice its ports (4 on a 2D torus, 6 on a 3D one). The
# memory is the capacity that the compiler of libtpu 0.0.52 reports when a program exceeds it.
# GPU: NVIDIA data sheets of A100 SXM 80GB, H100 SXM, H200 SXM and HGX B200, without sparsity; NVLink in one direction;
# memory as in `gpus/`. Network: one adapter per GPU, as in DGX systems: 200 Gb/s with A100, 400 Gb/s with the others.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 15.75 * 2**30, 197e12, 819e9, 50e9, 2, 8, 256),
        Chip("v5p", "tpu", 95.74 * 2**30, 459e12, 2765e9, 100e9, 3, 4, 6144),
        Chip("v6e", "tpu", 31.25 * 2**30, 918e12, 1638e9, 100e9, 2, 8, 256),
        _gpu("a100", 85_100_068_864, 312e12, 2039e9, 300e9, 25e9),
        _gpu("h100", 84_942_979_072, 989e12, 3350e9, 450e9, 50e9),
        _gpu("h200", 151_397_597_184, 989e12, 4800e9, 450e9, 50e9),
        _gpu("b200", 191_514_411_008, 2250e12, 7700e9, 900e9, 50e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of equal chips.

    Attributes:
      chip: the chip.
      shape: the shape of the torus, or the number of GPUs of a host.
      hosts: the number of hosts that only a network connects; 1 for a TPU slice, whose links connect all of its hosts.
    """

    chip: Chip
    shape: tuple[int, ...]
    hosts: int = 1

    @property
    def name(self) -> str:
        several = f"{self.hosts}x " if self.hosts > 1 else ""
        return f"{several}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        return self.hosts * self.devices_per_host

    @property
    def devices_per_host(self) -> int:
        """The number of devices without the network in between."""
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """Parse a topology such as `v5p:4x4x4`, `h100:8` or `2x h100:8`.

    Raises:
      UserError: the name has another form, the chip is unknown, or it does not come in this shape.
    """
    match = re.fullmatch(r"(?:(\d+)\s*x\s+)?(\w+):(\d+(?:x\d+)*)", name.strip().lower())
    if not match:
        raise UserError(
            f"--topology {name!r}: write chip:shape, such as v5p:4x4x4, h100:8 or '2x h100:8'; chips: {_known()}"
        )
    chip = CHIPS.get(match[2])
    if chip is None:
        raise UserError(
            f"--topology {name!r}: unknown chip {match[2]!r}{nearest(match[2], CHIPS)}; known: {_known()}"
        )
    shape = tuple(int(size) for size in match[3].split("x"))
    devices = math.prod(shape)
    if len(shape) != max(chip.axes, 1):
        example = {0: "8", 2: "4x4", 3: "2x2x4"}[chip.axes]
        raise UserError(
            f"--topology {name!r}: {chip.name} needs {max(chip.axes, 1)} numbers, e.g. {chip.name}:{example}"
        )
    if not 1 <= devices <= chip.pod:
        several = f"; write '{max(devices // 8, 2)}x {chip.name}:8' for several hosts"
        limit, advice = ("host", several) if chip.kind == "gpu" else ("pod", "; plan one slice of it")
        raise UserError(
            f"--topology {name!r}: {devices} devices, but a {limit} has at most {chip.pod}{advice}"
        )
    hosts = int(match[1] or 1)
    if hosts < 1 or (hosts > 1 and chip.kind == "tpu"):
        raise UserError(
            f"--topology {name!r}: {hosts} slices; a plan is for one slice of TPUs, or for hosts of GPUs"
        )
    return Topology(chip, shape, hosts)


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip with this `jax.Device.device_kind`; None if it is not in `CHIPS`."""
    tpus = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    gpu = re.match(r"NVIDIA ([ABH]\d00)\b", device_kind)
    return CHIPS.get(tpus.get(device_kind) or (gpu[1].lower() if gpu else ""))


def open_compiler(topology: Topology) -> list[object]:
    """Return the devices of a topology to compile for. None of them is needed, and none is searched for.

    Raises:
      UserError: the compiler is not installed, or does not know the topology.
    """
    return tpu_devices(topology) if topology.chip.kind == "tpu" else gpu_devices(topology)


def gpu_devices(topology: Topology) -> list[object]:
    """Return GPUs to compile for. The compiler is that of JAX's CUDA plugin, which needs no driver.

    Raises:
      UserError: the plugin is not installed.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(
            "planning for a GPU compiles with JAX's CUDA plugin, which is not installed; run: pip install "
            "'lpo_jax[plan-gpu]', or give --estimate for arithmetic alone"
        )
    from jax.experimental import topologies

    described = resources.files("lpo_jax.planner") / "gpus" / f"{topology.chip.name}.txtpb"
    shape = (
        f"{topology.hosts}x1x{topology.devices_per_host}"  # hosts that share NVLinks would be in the middle
    )
    try:
        found = topologies.get_topology_desc(
            topology.chip.name, platform="cuda", target_config=described.read_text(), topology=shape
        )
    except RuntimeError as error:
        raise UserError(f"--topology {topology.name!r}: the CUDA plugin cannot be used ({error})") from None
    return list(found.devices)


def tpu_devices(topology: Topology) -> list[object]:
    """Return the devices of a TPU slice to compile for. No TPU is needed, and none is searched for.

    Raises:
      UserError: libtpu is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for a TPU compiles with libtpu, which is not installed; run: pip install 'lpo_jax[plan]', or "
            "give --estimate for arithmetic alone"
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
