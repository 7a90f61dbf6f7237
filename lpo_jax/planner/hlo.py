"""A parser for the text of a compiled program: computations, instructions, iterations of loops, and collectives.

The text (`compiled.as_text()`) is a list of computations. Loops, fusions and asynchronous operations refer to the
computations that they run. `cost` and `collectives` walk them from the entry computation.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of a value.

    Attributes:
      dtype: XLA's name of the element type.
      dims: the shape.
      main: whether the value is in main memory, and not in the chip's fast memory.
    """

    dtype: str
    dims: tuple[int, ...]
    main: bool

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def size(self) -> int:
        """The size in bytes; a predicate has one, and a four-bit integer half of one."""
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D.*", "", self.dtype.lstrip("sufc")) or 0)
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction, from one line `%name = type opcode(operands), attributes`.

    Attributes:
      name: its name.
      arrays: the result; several for a tuple.
      opcode: the operation.
      operands: the names of the operands.
      rest: the attributes; for a parameter its number, for a constant its value.
      root: whether it is the result of its computation.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def called(self) -> dict[str, str]:
        """The names of the computations that it runs, by their role (`body`, `calls`, ...)."""
        return dict(_CALLED.findall(self.rest))

    @property
    def branches(self) -> list[str]:
        """The names of the branches of a conditional."""
        if several := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return re.findall(r"[\w.\-]+", several[1])
        return [name for key, name in self.called.items() if key in ("true_computation", "false_computation")]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: the instructions of each computation by name, by the name of the computation.
      entry: the name of the computation that runs first.
      open_iterations: the assumed iterations of loops whose number depends on data, such as the decode loop.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    open_iterations: int

    def iterations(self, loop: Instruction) -> int:
        """Return the iterations of a `while`.

        The compilers for CPU and GPU state them; for TPU they follow from a counter that starts at 0 and is compared
        with a constant.
        """
        if stated := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(stated[1])
        instructions = self.computations[loop.called["condition"]]
        root = _root(instructions)
        if root.opcode == "fusion":  # the comparison, with the constant as an operand or inside the fusion
            inner = self.computations[root.called["calls"]]
            instructions = instructions | inner
            root = _root(inner)
        constants = [i for i in instructions.values() if i.opcode == "constant" and i.rest.isdigit()]
        if root.opcode == "compare" and "direction=LT" in root.rest and len(constants) == 1:
            return int(constants[0].rest)
        return self.open_iterations

    def walk(self) -> Iterator[tuple[Instruction, int, int]]:
        """Yield every instruction that runs, with the number of loops around it and how often it runs."""
        yield from self._walk(self.entry, 0, 1)

    def _walk(self, name: str, in_loop: int, times: int) -> Iterator[tuple[Instruction, int, int]]:
        for i in self.computations.get(name, {}).values():
            yield i, in_loop, times
            if i.opcode == "while":
                yield from self._walk(i.called["body"], in_loop + 1, times * self.iterations(i))
                continue
            inner = (i.called[key] for key in ("calls", "to_apply") if key in i.called)
            for called in (*inner, *i.branches):
                yield from self._walk(called, in_loop, times)


def parse_hlo(text: str, open_iterations: int = 1) -> Program:
    """Parse the text returned by `jax.stages.Compiled.as_text`; `open_iterations` as in `Program`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return Program(computations, entry, open_iterations)


def _root(instructions: dict[str, Instruction]) -> Instruction:
    return next(i for i in instructions.values() if i.root)


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


def _instruction(line: str) -> Instruction | None:
    """Parse a line; None if it is not an instruction."""
    head = _LINE.match(line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    opcode = line[end:opening].strip()
    arrays = tuple(
        Array(dtype, tuple(int(d) for d in dims.split(",") if d), "S(" not in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(line[at:end])
    )
    inside = line[opening + 1 : closing]
    literal = opcode in ("parameter", "constant")
    operands = () if literal else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(
        head[2], arrays, opcode, operands, inside if literal else line[closing + 1 :], bool(head[1])
    )


def _closing(line: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced: {line[:200]}")


KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      shape: the shape of its result on one device, as XLA prints it; several if operations were combined.
      bytes: the size of that result.
      group: the devices of the first group; empty if the text does not contain it.
      in_loop: the number of loops around it.
      times: how often it runs, given the iterations of these loops.
      source: the operation in the Python program, if XLA has recorded it.
    """

    kind: str
    shape: str
    bytes: int
    group: tuple[int, ...]
    in_loop: int
    times: int
    source: str

    @property
    def devices(self) -> int:
        """The number of devices in a group; 0 if the text does not contain it."""
        return len(self.group)

    def hosts(self, per_host: int) -> int:
        """Return the number of hosts that a group is on, with devices in the order of hosts."""
        return len({device // per_host for device in self.group}) or 1


def collectives(program: Program) -> list[Collective]:
    """Return all collectives of a compiled program, in the order of its text."""
    return [
        Collective(
            kind,
            " ".join(map(str, arrays)),
            sum(array.size for array in arrays),
            _group(i.rest),
            in_loop,
            times,
            source[1] if (source := _SOURCE.search(i.rest)) else "",
        )
        for i, in_loop, times in program.walk()
        if (kind := i.opcode.removesuffix("-start")) in KINDS
        for arrays in [_received(i)]
    ]


_SOURCE = re.compile(r'op_name="([^"]*)"')
# Groups of devices are printed in three forms: {{0,1},{2,3}}, [2,2]<=[4] with axes that may be transposed, and
# mesh['a'=2,'b'=2], device_ids=([4]) {'a', 'b':(1)2}, where the identifiers of a plain range are left out.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?[^{]*\{([^}]*)\}"
)


def _received(i: Instruction) -> tuple[Array, ...]:
    """The results of a collective, without the operands and tokens in the tuple of an asynchronous one."""
    if i.opcode == "collective-permute-start":
        return i.arrays[1:2]  # (operand, result, two tokens)
    if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":
        return i.arrays[len(i.arrays) // 2 :]  # (operands, results)
    return i.arrays


def _group(attributes: str) -> tuple[int, ...]:
    """The devices of the first group."""
    if match := _LISTED.search(attributes):
        return tuple(_numbers(match[1]))
    if match := _IOTA.search(attributes):
        return tuple(_range(match[2], match[3])[: int(match[1])].tolist())
    if match := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
        devices = _range(match[2] or str(math.prod(sizes.values())), match[3]).reshape(tuple(sizes.values()))
        for at, name in enumerate(sizes):
            # 'b':(2)4 is the part of four of an axis behind a part of two.
            used = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", match[4])
            before, size = (int(used[1] or 1), int(used[2] or sizes[name])) if used else (1, 1)
            after = sizes[name] // before // size
            devices = devices.take(after * np.arange(size), axis=at)
        return tuple(devices.ravel().tolist())
    return ()


def _range(shape: str, axes: str | None) -> np.ndarray:
    """The numbers from 0 up in this shape with its axes permuted, as one list."""
    sizes = _numbers(shape)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(axes) if axes else None).ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
