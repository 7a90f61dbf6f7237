"""The cost of a compiled program on one device, read from its text: matrix FLOPs and memory traffic.

XLA's `cost_analysis` counts the body of a loop once, however often it runs, and a training step is a scan over
microbatches around a scan over layers. Here the body of a loop is multiplied by its number of iterations. If every loop
is counted once, the FLOPs agree with `cost_analysis` up to element-wise operations, which a test checks.

FLOPs are those of `dot`, of `convolution`, which matrix products become on a TPU, and of cuBLAS; the text does not
contain those of Pallas kernels and cuDNN. Bytes are those of the operands and results of every fused operation in main
memory; for slices, only the part that is accessed. Communication between devices is in `collectives`.

On a GPU one kernel runs after another, so that their times are summed: `busy`. On a TPU operations overlap.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection

import numpy as np

from lpo_jax.planner.hlo import Array, Instruction, Program

# Operations without memory traffic: they name, group or await the results of others.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "iota", "add-dependency", "domain"),
}


# Operations that update their first operand in place, and the operand with the new values.
_UPDATED_BY = {"dynamic-update-slice": 1, "scatter": 2}


@dataclasses.dataclass
class Cost:
    """The cost of a program on one device.

    Attributes:
      flops: matrix FLOPs.
      bytes: bytes read from and written to main memory.
      launches: kernels.
      kernels: bytes of Pallas kernels and cuDNN, part of `bytes`.
      busy: seconds of all other kernels, one after another.
    """

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    kernels: float = 0.0
    busy: float = 0.0

    def add(self, other: "Cost", times: int = 1) -> None:
        """Add the cost of `times` runs of `other`."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.launches += times * other.launches
        self.kernels += times * other.kernels
        self.busy += times * other.busy


def program_cost(
    program: Program, loops_once: bool = False, seconds: Callable[[float, float], float] = lambda f, b: 0.0
) -> Cost:
    """Compute the cost of one run of an optimised program.

    Args:
      program: the program.
      loops_once: count the body of every loop once, as XLA does.
      seconds: the time of a kernel with these FLOPs and bytes.
    """
    return _Reader(program, loops_once, seconds).of(program.entry, True)


class _Reader:
    def __init__(self, program: Program, loops_once: bool, seconds: Callable[[float, float], float]):
        self.program = program
        self.loops_once = loops_once
        self.seconds = seconds
        self.of = functools.cache(self._of)

    def _of(self, name: str, traffic: bool) -> Cost:
        """The cost of a computation. Inside a fusion (`traffic` False) there is no traffic to main memory."""
        total = Cost()
        instructions = self.program.computations[name]
        for i in instructions.values():
            called, before = i.called, total.flops
            if i.opcode == "while":
                iterations = 1 if self.loops_once else self.program.iterations(i)
                total.add(self.of(called["body"], traffic), iterations)
            elif i.opcode == "conditional":
                costs = (self.of(branch, traffic) for branch in i.branches)
                total.add(max(costs, key=lambda c: (c.flops, c.bytes)))
            elif i.opcode == "call":
                total.add(self.of(called["to_apply"], traffic))
            elif i.opcode in ("fusion", "async-start") and "calls" in called:
                total.add(self.of(called["calls"], False))
            elif i.opcode in ("dot", "convolution") or _CUBLAS in i.rest:
                total.flops += _matrix_flops(i, instructions)
            if traffic and not _free(i):
                moved = self._bytes(i, instructions, called.get("calls"))
                total.bytes += moved
                total.launches += 1
                if _KERNEL.search(i.rest):
                    total.kernels += moved
                else:
                    total.busy += self.seconds(total.flops - before, moved)
        return total

    def _bytes(self, i: Instruction, instructions: dict[str, Instruction], fused: str | None) -> float:
        operands = [instructions[name] for name in i.operands if name in instructions]
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _main(i.arrays)
        if i.opcode in _UPDATED_BY:
            return 2 * _main(operands[_UPDATED_BY[i.opcode]].arrays)
        if i.opcode in ("copy-start", "slice-start"):
            # Between two memories. The first result of a copy is the destination, and that of a slice the source.
            moved = i.arrays[i.opcode == "slice-start"]
            return moved.size * (moved.main + operands[0].arrays[0].main)
        if i.opcode.endswith("-start"):  # the result has the source, the destination and a context
            return sum(_main(o.arrays) for o in operands) + _main(i.arrays[1:2])
        if fused is None:  # a kernel that reads pages of an array has it as several operands
            return _main(i.arrays) + sum(_main(o.arrays) for o in {o.name: o for o in operands}.values())
        inner = self.program.computations[fused]
        written: float = _main(i.arrays)
        root = next(j for j in inner.values() if j.root)
        while root.opcode == "bitcast":
            root = inner[root.operands[0]]
        if root.opcode in _UPDATED_BY:  # only the updated part is written
            written = _main(inner[root.operands[_UPDATED_BY[root.opcode]]].arrays) if _main(i.arrays) else 0.0
        read = (self._touched(fused, n) for n, operand in enumerate(operands) if _main(operand.arrays))
        return written + sum(read)

    def _touched(self, fused: str, number: int) -> float:
        """Bytes of a fusion's input that are read: slices of it, unless an operation reads all of it."""
        inner = self.program.computations[fused].values()
        inputs = (j for j in inner if j.opcode == "parameter" and j.rest == str(number))
        return sum(self._read(j, inner) for j in inputs)

    def _read(self, array: Instruction, inner: Collection[Instruction]) -> float:
        whole = sum(a.size for a in array.arrays)
        if array.root:  # returned unchanged
            return whole
        total = 0.0
        for user in inner:
            for n, name in enumerate(user.operands):
                if name != array.name:
                    continue
                if user.opcode in ("dynamic-slice", "slice", "gather") and n == 0:
                    total += sum(a.size for a in user.arrays)
                elif user.opcode == "bitcast":
                    total += self._read(user, inner)
                elif user.opcode == "fusion":  # fusions inside fusions
                    total += self._touched(user.called["calls"], n)
                elif user.opcode not in _UPDATED_BY or n != 0:
                    return whole
        return min(total, whole)


# Custom calls that are Pallas kernels on TPUs, on GPUs, and attention by cuDNN. Their FLOPs are not in the text.
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton|__cudnn\$fmha)')


def _free(i: Instruction) -> bool:
    return i.opcode in _FREE or i.opcode.endswith(("-done", "-update"))


def _main(arrays: tuple[Array, ...]) -> int:
    return sum(a.size for a in arrays if a.main)


_CUBLAS = 'custom_call_target="__cublas$'
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)')


def _matrix_flops(i: Instruction, instructions: dict[str, Instruction]) -> float:
    left, right = (instructions[name].arrays[0].dims for name in i.operands[:2])
    out = i.arrays[0].dims
    if i.opcode != "convolution":
        contracted = _CONTRACTED.search(i.rest)[1]
        return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in re.findall(r"\d+", contracted))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    sizes = [dict(zip(axes, dims)) for axes, dims in zip(labels.groups(), (left, right, out))]
    flops = 2.0 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", i.rest) or ["", ""])[1]))
    for axis in range(len(out) - 2):
        one = {name: value.split("x")[axis] for name, value in window.items()}
        flops *= _meetings(sizes[0][str(axis)], sizes[1][str(axis)], sizes[2][str(axis)], one)
    return flops


def _meetings(inputs: int, kernel: int, outputs: int, window: dict[str, str]) -> int:
    """Count the pairs of a kernel element and a real input element along one spatial axis.

    A batched product is a convolution whose padding and dilation leave one such pair for each batch element.
    """
    low = int(re.match(r"-?\d+", window.get("pad", "0_0"))[0])
    number = lambda name: int(window.get(name, 1))  # noqa: E731
    at = number("stride") * np.arange(outputs)[:, None] - low + number("rhs_dilate") * np.arange(kernel)
    dilation = number("lhs_dilate")
    return int(np.sum((at >= 0) & (at % dilation == 0) & (at < inputs * dilation)))
