"""The commands that run a config and can be resumed: `lpo train`, `sft`, `meta` and `compare`."""

import argparse
import shlex
from collections.abc import Callable

from lpo_jax.commands.devices import use_compile_cache
from lpo_jax.commands.parsers import CommandParser

# Exit status of a run that a signal has stopped. It is not 0 because the run is not finished: deploy/worker.sh,
# launch_tpu.sh and the JobSet take 0 for a finished job and would not start it again.
STOPPED = 130


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of a command that runs a config."""
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    text = "continue the run in the config's output directory"
    command.add_argument("--resume", action="store_true", help=text)


def run_train(arguments: argparse.Namespace) -> int | None:
    """Run `lpo train` and return the exit status."""
    from lpo_jax.training.loop import train

    return run_config(train, arguments)


def run_sft(arguments: argparse.Namespace) -> int | None:
    """Run `lpo sft` and return the exit status."""
    from lpo_jax.training.sft import sft

    return run_config(sft, arguments)


def run_meta(arguments: argparse.Namespace) -> int | None:
    """Run `lpo meta` and return the exit status."""
    from lpo_jax.training.meta import meta

    return run_config(meta, arguments)


def run_compare(arguments: argparse.Namespace) -> int | None:
    """Run `lpo compare` and return the exit status."""
    from lpo_jax.compare.command import compare

    return run_config(compare, arguments, open_devices=False)  # the workers use the devices


def run_config(
    run: Callable[..., None], arguments: argparse.Namespace, *, open_devices: bool = True
) -> int | None:
    """Run a config; if a signal stops the run, print the command that resumes it.

    Args:
      run: function that takes the config and `resume`.
      arguments: parsed with the arguments of `add_arguments`.
      open_devices: whether this process computes.

    Returns:
      The exit status: `STOPPED` after a signal.
    """
    from lpo_jax.config import load_config
    from lpo_jax.parallel import hosts
    from lpo_jax.reporting.text import console
    from lpo_jax.runs.signals import Interrupted

    config = load_config(arguments.config, arguments.overrides)
    use_compile_cache()
    hosts.connect()
    if open_devices:
        hosts.require_devices()
    try:
        with hosts.together():
            run(config, resume=arguments.resume)
    except Interrupted:
        again = shlex.join(["lpo", arguments.command, arguments.config, *arguments.overrides, "--resume"])
        # The signal may be a hangup; `console` ignores a terminal that no longer exists.
        line = f"lpo: stopped by a signal; everything up to the last finished step is saved. Resume with: {again}"
        console().print(line, markup=False, highlight=False, soft_wrap=True)
        return STOPPED
    return None
