"""`lpo report`: one self-contained HTML file about one or more runs."""

import argparse

from lpo_jax.commands.parsers import CommandParser


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo report`."""
    command.add_argument("runs", metavar="RUN", nargs="+", help="run directory")
    command.add_argument(
        "--out", metavar="FILE", help="the file to write (report.html in the first directory)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo report`."""
    from lpo_jax.inspection.page import save_report

    path = save_report(arguments.runs, arguments.out)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser, it needs no network")
