"""`lpo compare`: run a config with many methods and report their differences."""

import argparse

from lpo_jax.commands.parsers import Subparsers
from lpo_jax.commands.resumable import add_run_parser, run_config


def add_parser(subparsers: Subparsers) -> None:
    """Add the parser of `lpo compare`."""
    add_run_parser(
        subparsers,
        "compare",
        "run the config with many methods, paired by seed, and report their differences",
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Run `lpo compare` and return the exit status."""
    from lpo_jax.compare.command import compare

    return run_config(compare, arguments, open_devices=False)  # the workers use the devices
