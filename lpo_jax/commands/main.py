"""The command `lpo`: parse the command line, run one command, and turn its errors into one line.

A user error prints one line on stderr and exits with status 2; a run that cannot continue prints one line and exits
with status 1; a run that a signal has stopped exits with status 130.
"""

import argparse
import errno
import gc
import os
import sys
from collections.abc import Callable, Sequence

from lpo_jax import __version__
from lpo_jax.allocator import keep_freed_memory
from lpo_jax.commands import (
    bench,
    data,
    diff,
    evaluate,
    export,
    methods,
    plan,
    report,
    resumable,
    sample,
    show,
    simplex,
    watch,
)
from lpo_jax.commands.parsers import CommandParser
from lpo_jax.commands.resumable import STOPPED
from lpo_jax.errors import RunStopped, UserError

Runner = Callable[[argparse.Namespace], int | None]

# Each command's arguments and function, in the order of `lpo --help`.
COMMANDS: dict[str, tuple[Callable[[CommandParser], None], Runner]] = {
    "train": (resumable.add_arguments, resumable.run_train),
    "sft": (resumable.add_arguments, resumable.run_sft),
    "meta": (resumable.add_arguments, resumable.run_meta),
    "compare": (resumable.add_arguments, resumable.run_compare),
    "eval": (evaluate.add_arguments, evaluate.run),
    "show": (show.add_arguments, show.run),
    "report": (report.add_arguments, report.run),
    "watch": (watch.add_arguments, watch.run),
    "diff": (diff.add_arguments, diff.run),
    "sample": (sample.add_arguments, sample.run),
    "export": (export.add_arguments, export.run),
    "methods": (methods.add_arguments, methods.run),
    "simplex": (simplex.add_arguments, simplex.run),
    "bench": (bench.add_arguments, bench.run),
    "plan": (plan.add_arguments, plan.run),
    "data": (data.add_arguments, data.run),
}
# What each command does, in one line.
HELP = {
    "train": "train a model on a task with Listwise Policy Optimization or a related method",
    "sft": "run the config's supervised warm start by itself",
    "meta": "learn the mirror map of gbmpo-mirror by evolution; every candidate is one run of the config",
    "compare": "run the config with many methods, paired by seed, and report their differences",
    "eval": "held-out pass@k of a run or of a config's model; with --suite, evaluate any model on benchmarks",
    "show": "show a run in the terminal: verdict and steps, responses, or one group with w*, P and c",
    "report": "write one HTML file about a run, or about several with their curves on top of each other",
    "watch": "serve the report of a running, finished or stopped run on this machine, read only",
    "diff": "show what differs between two runs: settings, code, data, first step, prompt and token",
    "sample": "print responses of a model to prompts",
    "export": "write a run's model as a Hugging Face directory",
    "methods": "list the methods with their formulas and options",
    "simplex": "draw the targets and updates of methods for three responses as a PNG file",
    "bench": "time sampling, the gradient or a whole step and compare it with this machine's peak rates",
    "plan": "compile a config for a slice without having one: what fits, how long a step takes, better settings",
    "data": "read a task's data, verify its solutions, and show its rows, prompts and content hash",
}
# Commands that accept config keys: all arguments that their parser does not know.
_CONFIGURABLE = ("train", "sft", "meta", "compare", "eval", "bench", "plan", "data")

# The garbage collector looks for cycles after so many new objects. jax makes many lasting objects while it traces. With
# Python's default of 700, the collector walks through them again and again: 2.0 s of a start, instead of 0.7 s.
_NEW_OBJECTS = 20_000

# A full, read-only or failing disk, wherever the error occurs. Code that has a better message raises its own error.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    keep_freed_memory()
    gc.set_threshold(_NEW_OBJECTS)
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" in arguments:
        arguments.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _, run = COMMANDS[arguments.command]
    try:
        return run(arguments) or 0
    except UserError as error:
        return _fail(error, 2)
    except RunStopped as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:  # `lpo methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}; repair the disk or free space on it, then start again", 1)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="lpo", description="Reinforcement learning with verifiable rewards in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lpo_jax {__version__}")
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    for name, text in HELP.items():
        command = subparsers.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in _CONFIGURABLE:
            command.set_defaults(overrides=[])
        add_arguments, _ = COMMANDS[name]
        add_arguments(command)
    return parser


def _fail(error: Exception | str, status: int) -> int:
    print(f"lpo: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
