"""`lpo compare`: run a config under many methods."""

import argparse

from lpo_jax.commands.parsers import Subparsers
from lpo_jax.commands.resumable import add_run_parser, run_config


def add_parser(subparsers: Subparsers) -> None:
    """Adds the parser of `lpo compare`."""
    add_run_parser(
        subparsers,
        "compare",
        "run the config under many methods, paired by seed, and report what they differ by",
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Run `lpo compare` and return the exit status."""
    from lpo_jax.compare.command import compare

    return run_config(compare, arguments, open_devices=False)  # the devices belong to its workers
