"""`lpo sft`: run the supervised warm start by itself."""

import argparse

from lpo_jax.commands.parsers import Subparsers
from lpo_jax.commands.resumable import add_run_parser, run_config


def add_parser(subparsers: Subparsers) -> None:
    """Add the parser of `lpo sft`."""
    add_run_parser(subparsers, "sft", "run the config's supervised warm start by itself")


def run(arguments: argparse.Namespace) -> int | None:
    """Run `lpo sft` and return the exit status."""
    from lpo_jax.training.sft import sft

    return run_config(sft, arguments)
