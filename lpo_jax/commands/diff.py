"""`lpo diff`: what differs between two runs, and where they part."""

import argparse

from lpo_jax.commands.parsers import CommandParser


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo diff`."""
    command.add_argument("first", metavar="RUN", help="run directory")
    command.add_argument("second", metavar="RUN", help="run directory")


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo diff`."""
    from lpo_jax.inspection import terminal
    from lpo_jax.inspection.diff import compare_runs
    from lpo_jax.inspection.load import read_run
    from lpo_jax.reporting.text import console

    first, second = read_run(arguments.first), read_run(arguments.second)
    console().print(terminal.difference((arguments.first, arguments.second), compare_runs(first, second)))
