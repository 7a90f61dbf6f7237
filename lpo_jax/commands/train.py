"""`lpo train`: train a model on a task."""

import argparse

from lpo_jax.commands.parsers import Subparsers
from lpo_jax.commands.resumable import add_run_parser, run_config


def add_parser(subparsers: Subparsers) -> None:
    """Add the parser of `lpo train`."""
    add_run_parser(
        subparsers, "train", "train a model on a task with Listwise Policy Optimization or a related method"
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Run `lpo train` and return the exit status."""
    from lpo_jax.training.loop import train

    return run_config(train, arguments)
