"""What a compiled program does on one device, read from its text: matrix arithmetic and memory traffic.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and a training step is a scan over
microbatches around a scan over layers. Here a loop counts as often as its condition says. With every loop counted
once, the arithmetic agrees with `cost_analysis` up to element-wise operations (a test holds it to that).

Counted: FLOPs of `dot` and `convolution` (the form that matrix products take on a TPU; of a Pallas kernel the text
says nothing); bytes of the operands and results of every fused operation that lie in the device's main memory,
slices by the part that is touched. What devices exchange is in `collectives`.
"""

import dataclasses
import functools
import math
import re

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
# Operations without traffic of their own: they name, group or await what others have moved.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "iota", "add-dependency", "domain"),
}


@dataclasses.dataclass
class Cost:
    """Of one device: matrix FLOPs, and bytes from and to main memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds `times` runs of `other`."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes


@dataclasses.dataclass(frozen=True)
class _Array:
    dtype: str
    dims: tuple[int, ...]
    main: bool  # lies in main memory, not in a chip's own fast memory

    @property
    def size(self) -> int:
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D.*", "", self.dtype.lstrip("sufc")) or 0)
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    arrays: tuple[_Array, ...]  # of the result; several for a tuple
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes
    root: bool


def program_cost(text: str, loops_once: bool = False) -> Cost:
    """Reads the text of an optimized program (`compiled.as_text()`).

    Args:
      loops_once: count every loop's body once, as XLA does. A loop whose number of turns depends on data (the decode
        loop) always counts once.
    """
    return _Program(text, loops_once).cost()


def with_turns(text: str) -> str:
    """The text with each loop's number of turns written into its line, as compilers for CPU and GPU do themselves.

    The one for TPUs leaves it to be read off the condition; `collectives` knows only what is written.
    """
    program = _Program(text, False)

    def written(line: str) -> str:
        loop = _parse_instruction(line) if " while(" in line else None
        if loop is None or "known_trip_count" in line:
            return line
        condition = dict(_CALLED.findall(loop.rest))["condition"].lstrip("%")
        turns = program.turns(loop, condition)
        return f'{line}, backend_config={{"known_trip_count":{{"n":"{turns}"}}}}'

    return "\n".join(written(line) for line in text.splitlines())


class _Program:
    def __init__(self, text: str, loops_once: bool):
        self.loops_once = loops_once
        self.computations: dict[str, dict[str, _Instruction]] = {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                current = self.computations.setdefault(header[2], {})
                if header[1]:
                    self.entry = header[2]
            elif instruction := _parse_instruction(line):
                current[instruction.name] = instruction
        self.of = functools.cache(self._of)

    def cost(self) -> Cost:
        return self.of(self.entry, True)

    def _of(self, name: str, traffic: bool) -> Cost:
        """Of a computation; inside a fusion (`traffic` False) nothing goes through main memory."""
        total = Cost()
        instructions = self.computations[name]
        for i in instructions.values():
            called = {key: value.lstrip("%") for key, value in _CALLED.findall(i.rest)}
            if i.opcode == "while":
                turns = 1 if self.loops_once else self.turns(i, called["condition"])
                total.add(self.of(called["body"], traffic), turns)
            elif i.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
                names = (
                    re.findall(r"%([\w.\-]+)", branches[1])
                    if branches
                    else [called["true_computation"], called["false_computation"]]
                )
                total.add(max((self.of(n, traffic) for n in names), key=lambda c: (c.flops, c.bytes)))
            elif i.opcode == "call":
                total.add(self.of(called["to_apply"], traffic))
            elif i.opcode in ("fusion", "async-start") and "calls" in called:
                total.add(self.of(called["calls"], False))
            elif i.opcode in ("dot", "convolution"):
                total.flops += _matrix_flops(i, instructions)
            if traffic:
                total.bytes += self._bytes(i, instructions, called.get("calls"))
        return total

    def turns(self, loop: _Instruction, condition: str) -> int:
        """How often a loop runs: stated by the compiler, or a counter from 0 compared with a constant."""
        if stated := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(stated[1])
        instructions = self.computations[condition]
        root = next(i for i in instructions.values() if i.root)
        if root.opcode == "fusion":  # the comparison, with the constant as an operand or inside
            inner = self.computations[_CALLED.search(root.rest)[2].lstrip("%")]
            instructions = instructions | inner
            root = next(i for i in inner.values() if i.root)
        constants = [i for i in instructions.values() if i.opcode == "constant" and i.rest.isdigit()]
        if root.opcode == "compare" and "direction=LT" in root.rest and len(constants) == 1:
            return int(constants[0].rest)
        return 1

    def _bytes(self, i: _Instruction, instructions: dict[str, _Instruction], fused: str | None) -> float:
        if i.opcode in _FREE or i.opcode.endswith("-done") or i.opcode.endswith("-update"):
            return 0.0
        operands = [instructions[name] for name in i.operands if name in instructions]
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _main(i.arrays)
        if i.opcode == "dynamic-update-slice":
            return 2 * _main(operands[1].arrays)
        if i.opcode.endswith("-start"):  # the result names the source, the destination and a context
            return sum(_main(o.arrays) for o in operands) + _main(i.arrays[1:2])
        if fused is None:
            return _main(i.arrays) + sum(_main(o.arrays) for o in operands)
        inner = self.computations[fused]
        written = _main(i.arrays)
        read = 0.0
        users: dict[str, list[_Instruction]] = {}
        for j in inner.values():
            for name in j.operands:
                users.setdefault(name, []).append(j)
        root = next(j for j in inner.values() if j.root)
        while root.opcode == "bitcast":
            root = inner[root.operands[0]]
        if root.opcode == "dynamic-update-slice":  # in place: only the part
            written = _main(inner[root.operands[1]].arrays) if _main(i.arrays) else 0.0
        for j in inner.values():
            if j.opcode != "parameter":
                continue
            source = operands[int(j.rest)] if int(j.rest) < len(operands) else j
            if not _main(source.arrays):
                continue
            read += _touched(j, users)
        return read + written


def _touched(array: _Instruction, users: dict[str, list[_Instruction]]) -> float:
    """Bytes of a fusion's input that are read: slices of it, unless something takes it whole."""
    whole = sum(a.size for a in array.arrays)
    total = 0.0
    for user in users.get(array.name, []):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == array.name:
            total += sum(a.size for a in user.arrays)
        elif user.opcode == "bitcast":
            total += _touched(user, users)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == array.name:
            continue
        else:
            return whole
    return min(total, whole)


_CALLED = re.compile(r"(calls|body|condition|to_apply|true_computation|false_computation)=(%?[\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


def _parse_instruction(line: str) -> _Instruction | None:
    """One line `%name = type opcode(operands), attributes` of a computation; None for what is no instruction."""
    head = _LINE.match(line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    opcode = line[end:opening].strip()
    arrays = tuple(
        _Array(dtype, tuple(int(d) for d in dims.split(",") if d), "S(" not in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(line[at:end])
    )
    inside = line[opening + 1 : closing]
    literal = opcode in ("parameter", "constant")
    operands = () if literal else tuple(re.findall(r"%([\w.\-]+)", inside))
    return _Instruction(
        head[2], arrays, opcode, operands, inside if literal else line[closing + 1 :], bool(head[1])
    )


def _closing(line: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced: {line[:200]}")


def _main(arrays: tuple[_Array, ...]) -> int:
    return sum(a.size for a in arrays if a.main)


def _matrix_flops(i: _Instruction, instructions: dict[str, _Instruction]) -> float:
    left, right = (instructions[name].arrays[0].dims for name in i.operands[:2])
    out = i.arrays[0].dims
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
        return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted.split(",") if d)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    sizes = [dict(zip(axes, dims)) for axes, dims in zip(labels.groups(), (left, right, out))]
    flops = 2.0 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", i.rest) or ["", ""])[1]))
    for axis in range(len(out) - 2):
        one = {name: value.split("x")[axis] for name, value in window.items()}
        flops *= _meetings(sizes[0][str(axis)], sizes[1][str(axis)], sizes[2][str(axis)], one)
    return flops


def _meetings(inputs: int, kernel: int, outputs: int, window: dict[str, str]) -> int:
    """Pairs of a kernel element and a real input element along one spatial axis.

    A batched product is a convolution whose padding and dilation leave one such pair per batch element.
    """
    low = int(re.match(r"-?\d+", window.get("pad", "0_0"))[0])
    number = lambda name: int(window.get(name, 1))  # noqa: E731
    at = number("stride") * np.arange(outputs)[:, None] - low + number("rhs_dilate") * np.arange(kernel)
    dilation = number("lhs_dilate")
    return int(np.sum((at >= 0) & (at % dilation == 0) & (at < inputs * dilation)))
