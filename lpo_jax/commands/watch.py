"""`lpo watch`: the report of a run from a small local server, while the run goes on."""

import argparse

from lpo_jax.commands.parsers import Subparsers, add_command, natural


def add_parser(subparsers: Subparsers) -> None:
    """Add the parser of `lpo watch`."""
    command = add_command(
        subparsers,
        "watch",
        "serve the report of a running, finished or stopped run on this machine, read only",
    )
    command.add_argument("runs", metavar="RUN", nargs="+", help="run directory")
    command.add_argument("--port", type=natural, default=8787, help="port; 0 takes a free one (8787)")


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo watch` until Ctrl-C."""
    from lpo_jax.inspection.load import read_run
    from lpo_jax.inspection.server import HOST, Watcher, make_server

    for path in arguments.runs:
        read_run(path)
    with make_server(Watcher(arguments.runs), arguments.port) as server:
        print(f"http://{HOST}:{server.server_port}/  (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
