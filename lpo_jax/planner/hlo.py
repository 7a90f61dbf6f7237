"""The text of a compiled program, taken apart: its computations, their instructions, how often its loops run.

A text (`compiled.as_text()`) has one computation after another; loops, fusions and asynchronous operations name the
computations that they run. `cost` and `collectives` walk them from the entry.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of a value.

    Attributes:
      main: lies in main memory, not in a chip's own fast memory.
    """

    dtype: str
    dims: tuple[int, ...]
    main: bool

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def size(self) -> int:
        """Bytes; a predicate takes one, four-bit integers half of one."""
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D.*", "", self.dtype.lstrip("sufc")) or 0)
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line `%name = type opcode(operands), attributes`.

    Attributes:
      arrays: of the result; several for a tuple.
      rest: the attributes; of a parameter its number, of a constant its value.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def called(self) -> dict[str, str]:
        """Computations that it runs, by what they are to it (`body`, `calls`, ...)."""
        return dict(_CALLED.findall(self.rest))

    @property
    def branches(self) -> list[str]:
        """Computations of which a conditional runs one."""
        if several := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return re.findall(r"[\w.\-]+", several[1])
        return [name for key, name in self.called.items() if key in ("true_computation", "false_computation")]


@dataclasses.dataclass(frozen=True)
class Program:
    """Attributes:
    computations: by name, the instructions of each by their names.
    entry: name of the one that runs first.
    open_turns: what a loop is taken to run whose turns depend on data, as those of the decode loop.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    open_turns: int

    def turns(self, loop: Instruction) -> int:
        """How often a `while` runs: stated by the compiler (for CPU and GPU), or a counter from 0 compared with a
        constant (for TPU)."""
        if stated := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(stated[1])
        instructions = self.computations[loop.called["condition"]]
        root = _root(instructions)
        if root.opcode == "fusion":  # the comparison, with the constant as an operand or inside
            inner = self.computations[root.called["calls"]]
            instructions = instructions | inner
            root = _root(inner)
        constants = [i for i in instructions.values() if i.opcode == "constant" and i.rest.isdigit()]
        if root.opcode == "compare" and "direction=LT" in root.rest and len(constants) == 1:
            return int(constants[0].rest)
        return self.open_turns

    def walk(self) -> Iterator[tuple[Instruction, int, int]]:
        """Every instruction that runs, in the order of the text, with the loops it stands in and its runs."""
        yield from self._walk(self.entry, 0, 1)

    def _walk(self, name: str, in_loop: int, times: int) -> Iterator[tuple[Instruction, int, int]]:
        for i in self.computations.get(name, {}).values():
            yield i, in_loop, times
            if i.opcode == "while":
                yield from self._walk(i.called["body"], in_loop + 1, times * self.turns(i))
                continue
            inner = (i.called[key] for key in ("calls", "to_apply") if key in i.called)
            for called in (*inner, *i.branches):
                yield from self._walk(called, in_loop, times)


def parse(text: str, open_turns: int = 1) -> Program:
    """The program of a text that `jax.stages.Compiled.as_text` gave; `open_turns` as in `Program`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return Program(computations, entry, open_turns)


def _root(instructions: dict[str, Instruction]) -> Instruction:
    return next(i for i in instructions.values() if i.root)


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


def _instruction(line: str) -> Instruction | None:
    """What a line says; None for what is no instruction."""
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
