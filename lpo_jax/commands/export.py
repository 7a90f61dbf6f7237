"""`lpo export`: write a run's model as a Hugging Face directory."""

import argparse

from lpo_jax.commands.devices import open_devices
from lpo_jax.commands.parsers import CommandParser, add_checkpoint_option


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo export`."""
    command.add_argument("source", metavar="RUN", help="run directory")
    command.add_argument("out", metavar="OUT", help="directory to create")
    add_checkpoint_option(command)
    dtypes, text = ("float32", "bfloat16"), "dtype of the saved weights (float32)"
    command.add_argument("--dtype", choices=dtypes, default="float32", help=text)


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo export`."""
    from lpo_jax.runs.checkpoint import load_run

    open_devices()
    model, step = load_run(arguments.source, arguments.checkpoint)
    model.save(arguments.out, arguments.dtype)
    print(
        f"wrote step {step} of {arguments.source} to {arguments.out} (Hugging Face safetensors, {arguments.dtype})"
    )
