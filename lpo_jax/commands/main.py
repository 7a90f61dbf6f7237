"""The command `lpo`: parse the command line, run one command, and turn its errors into one line.

A user error prints one line on stderr and exits with status 2; a run that cannot continue prints one line and exits
with status 1; a run that a signal has stopped exits with status 130.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from lpo_jax import __version__
from lpo_jax.allocator import keep_freed_memory
from lpo_jax.commands import (
    bench,
    compare,
    data,
    diff,
    evaluate,
    export,
    meta,
    methods,
    parsers,
    plan,
    report,
    sample,
    sft,
    show,
    simplex,
    train,
    watch,
)
from lpo_jax.commands.resumable import STOPPED
from lpo_jax.errors import RunStopped, UserError

# Each command's parser and function, in the order of `lpo --help`.
COMMANDS: dict[
    str, tuple[Callable[[parsers.Subparsers], None], Callable[[argparse.Namespace], int | None]]
] = {
    "train": (train.add_parser, train.run),
    "sft": (sft.add_parser, sft.run),
    "meta": (meta.add_parser, meta.run),
    "compare": (compare.add_parser, compare.run),
    "eval": (evaluate.add_parser, evaluate.run),
    "show": (show.add_parser, show.run),
    "report": (report.add_parser, report.run),
    "watch": (watch.add_parser, watch.run),
    "diff": (diff.add_parser, diff.run),
    "sample": (sample.add_parser, sample.run),
    "export": (export.add_parser, export.run),
    "methods": (methods.add_parser, methods.run),
    "simplex": (simplex.add_parser, simplex.run),
    "bench": (bench.add_parser, bench.run),
    "plan": (plan.add_parser, plan.run),
    "data": (data.add_parser, data.run),
}

# A full, read-only or failing disk, wherever the error occurs. Code that has a better message raises its own error.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    keep_freed_memory()
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
        dest="command", required=True, metavar="COMMAND", parser_class=parsers.CommandParser
    )
    for add_parser, _ in COMMANDS.values():
        add_parser(subparsers)
    return parser


def _fail(error: Exception | str, status: int) -> int:
    print(f"lpo: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
