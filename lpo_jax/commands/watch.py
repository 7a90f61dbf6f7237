"""`lpo watch`: the report of a run from a small local server, while the run goes on."""

import argparse

from lpo_jax.commands.parsers import CommandParser, natural


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo watch`."""
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
