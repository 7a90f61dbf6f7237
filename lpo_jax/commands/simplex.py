"""`lpo simplex`: draw the targets and updates of methods for three responses."""

import argparse
import os

from lpo_jax.commands.methods import build_objective
from lpo_jax.commands.parsers import CommandParser, finite
from lpo_jax.errors import UserError


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo simplex`."""
    command.add_argument("--rewards", default="1,0,0", help="rewards of the three responses (1,0,0)")
    command.add_argument(
        "--methods",
        default="lpo-forward,lpo-reverse,grpo",
        help="names, optionally with options such as lpo-forward:divergence=js (lpo-forward,lpo-reverse,grpo)",
    )
    command.add_argument("--out", default="simplex.png", help="file to write (simplex.png)")


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo simplex`."""
    from lpo_jax.parallel import hosts
    from lpo_jax.reporting.simplex import draw

    hosts.require_devices()
    try:
        rewards = [finite(reward) for reward in arguments.rewards.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(f"--rewards: expected numbers, such as 1,0,0; got {arguments.rewards!r}") from None
    if not arguments.out.endswith(".png"):
        raise UserError(f"--out: the picture is a PNG file, so its name ends in .png; got {arguments.out!r}")
    if not os.path.isdir(os.path.dirname(arguments.out) or "."):
        raise UserError(f"--out: no such directory: {os.path.dirname(arguments.out)}")
    methods = {spec.strip(): build_objective(spec.strip()) for spec in arguments.methods.split(",")}
    try:
        print(f"wrote {draw(rewards, methods, arguments.out)}")
    except OSError as error:
        raise UserError(f"--out: cannot write {arguments.out}: {error.strerror}") from None
