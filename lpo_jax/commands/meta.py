"""`lpo meta`: learn the mirror map of gbmpo-mirror."""

import argparse

from lpo_jax.commands.parsers import Subparsers
from lpo_jax.commands.resumable import add_run_parser, run_config


def add_parser(subparsers: Subparsers) -> None:
    """Add the parser of `lpo meta`."""
    add_run_parser(
        subparsers,
        "meta",
        "learn the mirror map of gbmpo-mirror by evolution; every candidate is one run of the config",
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Run `lpo meta` and return the exit status."""
    from lpo_jax.training.meta import meta

    return run_config(meta, arguments)
