"""`lpo train`: train a model on a task."""

import argparse

from lpo_jax.commands.parsers import Subparsers
from lpo_jax.commands.resumable import add_run_parser, run_config


def add_parser(subparsers: Subparsers) -> None:
    """Adds the parser of `lpo train`."""
    add_run_parser(
        subparsers,
        "train",
        "train a model on a task with Listwise Policy Optimization or a relative",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs `lpo train`."""
    from lpo_jax.training.loop import train

    run_config(train, arguments)
