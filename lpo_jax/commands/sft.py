"""`lpo sft`: the supervised warm start as a run of its own."""

import argparse

from lpo_jax.commands.parsers import Subparsers
from lpo_jax.commands.resumable import add_run_parser, run_config


def add_parser(subparsers: Subparsers) -> None:
    """Adds the parser of `lpo sft`."""
    add_run_parser(
        subparsers,
        "sft",
        "the config's supervised warm start as a run of its own",
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Run `lpo sft` and return the exit status."""
    from lpo_jax.training.sft import sft

    return run_config(sft, arguments)
