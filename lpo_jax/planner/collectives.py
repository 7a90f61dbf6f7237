"""Which data devices exchange in a compiled program: every collective, its place in loops and how often it runs."""

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
      shape: of its result on one device, as XLA writes it; several when operations were combined.
      bytes: of that result.
      devices: how many exchange with each other; 0 where the text does not say.
      in_loop: how many loops it stands in.
      times: how often it runs, with the turns of the loops that it stands in.
      source: where in the Python program it comes from, as far as XLA remembers.
    """

    kind: str
    shape: str
    bytes: int
    devices: int
    in_loop: int
    times: int
    source: str


def collectives(program: Program) -> list[Collective]:
    """All of a compiled program, in the order of its text."""
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
# Groups of devices come in three forms: {{0,1},{2,3}}, [2,2]<=[4], and mesh['a'=2,'b'=2] {'a', 'b':(1)2}.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


def _received(i: Instruction) -> tuple[Array, ...]:
    """The results of a collective; of an asynchronous one without its operands and tokens."""
    if i.opcode == "collective-permute-start":
        return i.arrays[1:2]  # (operand, result, two tokens)
    if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":
        return i.arrays[len(i.arrays) // 2 :]  # (operands, results)
    return i.arrays


def _devices(attributes: str) -> int:
    """How many devices are in a group."""
    if match := _LISTED.search(attributes):
        return len(match[1].split(","))
    if match := _IOTA.search(attributes):
        return int(match[1])
    if match := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
        used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    return 0
