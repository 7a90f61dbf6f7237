"""Which data devices exchange in a compiled program: read off the text that XLA gives of it.

The text has one computation after another; loops, fusions and asynchronous operations name the computations
they run. A walk from the entry finds every collective, how deep in loops it stands and how often it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

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
      times: how often it runs, as far as the trip counts of the loops are known (an unknown one counts 1).
      source: where in the Python program it comes from, as far as XLA remembers.
    """

    kind: str
    shape: str
    bytes: int
    devices: int
    in_loop: int
    times: int
    source: str


def collectives(compiled: Any) -> list[Collective]:
    """All of a compiled program (`jax.stages.Compiled`), or of its text, in the order of the text."""
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations, entry = _computations(text)
    return list(_walk(computations, entry, 0, 1))


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_SOURCE = re.compile(r'op_name="([^"]*)"')
# Groups of devices come in three forms: {{0,1},{2,3}}, [2,2]<=[4], and mesh['a'=2,'b'=2] {'a', 'b':(1)2}.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that runs first."""
    found, entry, lines = {}, "", []
    for line in text.splitlines():
        if not line.startswith(" ") and (header := _HEADER.match(line)):
            lines = found[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return found, entry


def _walk(computations: dict[str, list[str]], name: str, in_loop: int, times: int) -> Iterator[Collective]:
    for line in computations.get(name, ()):
        if loop := _WHILE.search(line):
            trips = _TRIPS.search(line)
            count = times * int(trips[1]) if trips else times
            yield from _walk(computations, loop[1], in_loop + 1, count)
        elif match := _COLLECTIVE.search(line):
            yield _collective(line, match, in_loop, times)
        else:
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"[\w.\-]+", branches)
            for inner in called:
                yield from _walk(computations, inner, in_loop, times)


def _collective(line: str, match: re.Match, in_loop: int, times: int) -> Collective:
    shapes = _SHAPE.findall(line[: match.start()].split(" = ", 1)[1])
    if match[2] and match[1] == "collective-permute":
        shapes = shapes[1:2]  # (operand, result, two tokens)
    elif match[2] and match[1] != "all-reduce":
        shapes = shapes[len(shapes) // 2 :]  # (operands, results)
    source = _SOURCE.search(line)
    return Collective(
        match[1],
        " ".join(f"{kind}[{size}]" for kind, size in shapes),
        sum(_bytes(kind, size) for kind, size in shapes),
        _devices(line),
        in_loop,
        times,
        source[1] if source else "",
    )


def _devices(line: str) -> int:
    """How many devices are in a group."""
    if match := _LISTED.search(line):
        return len(match[1].split(","))
    if match := _IOTA.search(line):
        return int(match[1])
    if match := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
        used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    return 0


def _bytes(kind: str, size: str) -> int:
    """Of `f32[2,3]`; a predicate takes a byte, four-bit integers half of one."""
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return math.prod(int(n) for n in size.split(",") if n) * bits // 8
