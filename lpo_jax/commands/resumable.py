"""Shared implementation of the commands that run a config and can be resumed: `lpo train`, `sft`, `meta`, `compare`."""

import argparse
import shlex
from collections.abc import Callable

from lpo_jax.commands.devices import use_compile_cache
from lpo_jax.commands.parsers import Subparsers, add_command

# Exit status of a run that a signal has stopped. It is not 0 because the run is not finished: deploy/worker.sh,
# launch_tpu.sh and the JobSet take 0 for a finished job and would not start it again.
STOPPED = 130


def add_run_parser(subparsers: Subparsers, name: str, text: str) -> None:
    """Add the parser of a command that runs a config."""
    command = add_command(subparsers, name, text, configurable=True)
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument(
        "--resume", action="store_true", help="continue the run in the config's output directory"
    )


def run_config(
    run: Callable[..., None], arguments: argparse.Namespace, *, open_devices: bool = True
) -> int | None:
    """Run a config; if a signal stops the run, print the command that resumes it.

    Args:
      run: function that takes the config and `resume`.
      arguments: parsed by the parser of `add_run_parser`.
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
