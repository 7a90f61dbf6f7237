"""`lpo watch`: the report of a run over HTTP, for a reader on this machine, while the run goes on.

The server listens on the loopback interface only, answers GET for two addresses, and writes nothing. It answers only
requests whose Host header names the loopback interface, so that no other web page can read the report by giving its own
name the address of this machine. The page asks `/state` every two seconds and loads itself again after a new step.
"""

import hashlib
import http.server
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from lpo_jax.errors import UserError
from lpo_jax.inspection.load import read_run, status
from lpo_jax.inspection.page import render

HOST = "127.0.0.1"
_NAMES = ("127.0.0.1", "localhost")
_WATCHED = ("metrics.jsonl", "rollouts", "validation", "config.yaml")


class Watcher:
    """The report of some runs, rendered again when their files have changed.

    Args:
        paths: the run directories.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self._paths = [Path(path) for path in paths]
        self._lock = threading.Lock()
        self._page: tuple[str, bytes] | None = None

    def page(self) -> bytes:
        """Return the report as UTF-8."""
        with self._lock:
            version = self.version()
            if self._page is None or self._page[0] != version:
                html = render([read_run(path) for path in self._paths], live=True)
                self._page = version, html.encode("utf-8", "backslashreplace")
            return self._page[1]

    def state(self) -> bytes:
        """Return the version of the files and a line about the runs, as JSON."""
        runs = [read_run(path) for path in self._paths]
        text = " · ".join(f"{status(run)}, step {run.last_step}" for run in runs)
        return json.dumps({"version": self.version(), "text": text}).encode()

    def version(self) -> str:
        """Return a digest of the times and sizes of the files that the report is made from."""
        digest = hashlib.sha256()
        for path in self._paths:
            for name in _WATCHED:
                try:
                    about = (path / name).stat()
                except OSError:
                    continue
                digest.update(f"{name} {about.st_mtime_ns} {about.st_size}\n".encode())
            digest.update(status_of_lock(path).encode())
        return digest.hexdigest()[:16]


def status_of_lock(path: Path) -> str:
    """Return the status of the run in a directory; empty if there is none yet."""
    try:
        return status(read_run(path))
    except UserError:
        return ""


def make_server(watcher: Watcher, port: int) -> http.server.ThreadingHTTPServer:
    """Return a server on the loopback interface.

    Args:
        watcher: what it serves.
        port: the port; 0 takes a free one.

    Raises:
        UserError: the port cannot be used.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in _NAMES:
                return self._answer(403, b"this server answers only requests to 127.0.0.1", "text/plain")
            try:
                if self.path == "/":
                    return self._answer(200, watcher.page(), "text/html; charset=utf-8")
                if self.path == "/state":
                    return self._answer(200, watcher.state(), "application/json")
            except UserError as error:  # the run may have been removed meanwhile
                return self._answer(
                    503, str(error).encode("utf-8", "backslashreplace"), "text/plain; charset=utf-8"
                )
            self._answer(404, b"not found", "text/plain")

        def _answer(self, code: int, body: bytes, kind: str) -> None:
            try:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the reader closed the page

        def log_message(self, format: str, *values: object) -> None:
            """Print nothing: one line every two seconds says little."""

    try:
        return http.server.ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--port {port}: cannot listen there ({reason}); choose another, or 0 for a free one"
        ) from None
