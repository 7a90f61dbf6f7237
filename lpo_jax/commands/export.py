"""`lpo export`: write a run's model as a Hugging Face directory."""

import argparse

from lpo_jax.commands.devices import open_devices
from lpo_jax.commands.parsers import Subparsers, add_checkpoint_option, add_command


def add_parser(subparsers: Subparsers) -> None:
    """Add the parser of `lpo export`."""
    command = add_command(subparsers, "export", "write a run's model as a Hugging Face directory")
    command.add_argument("source", metavar="RUN", help="run directory")
    command.add_argument("out", metavar="OUT", help="directory to create")
    add_checkpoint_option(command)
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the saved weights (float32)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo export`."""
    from lpo_jax.runs.checkpoint import load_run

    open_devices()
    model, step = load_run(arguments.source, arguments.checkpoint)
    model.save(arguments.out, arguments.dtype)
    print(
        f"wrote step {step} of {arguments.source} to {arguments.out} (Hugging Face safetensors, {arguments.dtype})"
    )
