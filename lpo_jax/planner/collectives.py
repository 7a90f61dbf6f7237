"""The collectives of a compiled program: what devices exchange, in which loops, and how often."""

import dataclasses
import math
import re

from lpo_jax.planner.hlo import Array, Instruction, Program

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      shape: the shape of its result on one device, as XLA prints it; several if operations were combined.
      bytes: the size of that result.
      devices: the number of devices in a group; 0 if the text does not contain it.
      in_loop: the number of loops around it.
      times: how often it runs, given the iterations of these loops.
      source: the operation in the Python program, if XLA has recorded it.
    """

    kind: str
    shape: str
    bytes: int
    devices: int
    in_loop: int
    times: int
    source: str


def collectives(program: Program) -> list[Collective]:
    """Return all collectives of a compiled program, in the order of its text."""
    return [
        Collective(
            kind,
            " ".join(map(str, arrays)),
            sum(array.size for array in arrays),
            _devices(i.rest),
            in_loop,
            times,
            source[1] if (source := _SOURCE.search(i.rest)) else "",
        )
        for i, in_loop, times in program.walk()
        if (kind := i.opcode.removesuffix("-start")) in KINDS
        for arrays in [_received(i)]
    ]


_SOURCE = re.compile(r'op_name="([^"]*)"')
# Groups of devices are printed in three forms: {{0,1},{2,3}}, [2,2]<=[4], and mesh['a'=2,'b'=2] {'a', 'b':(1)2}.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


def _received(i: Instruction) -> tuple[Array, ...]:
    """The results of a collective, without the operands and tokens in the tuple of an asynchronous one."""
    if i.opcode == "collective-permute-start":
        return i.arrays[1:2]  # (operand, result, two tokens)
    if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":
        return i.arrays[len(i.arrays) // 2 :]  # (operands, results)
    return i.arrays


def _devices(attributes: str) -> int:
    """The number of devices in a group."""
    if match := _LISTED.search(attributes):
        return len(match[1].split(","))
    if match := _IOTA.search(attributes):
        return int(match[1])
    if match := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
        used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    return 0
