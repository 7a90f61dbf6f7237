"""The program that a pool's worker process runs, and the messages it exchanges with the pool.

Requests are pickles (the parent is trusted, and rows hold any Python value); replies are JSON, so that the
trainer never unpickles what comes from a process that has handled a model's text. Both are led by their
length.
"""

import importlib
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys

from lpo_jax.errors import UserError
from lpo_jax.rewards.verdict import infrastructure

HEADER = struct.Struct("!Q")


def frame(payload: bytes) -> bytes:
    """A payload led by its length."""
    return HEADER.pack(len(payload)) + payload


def _bound_memory(limit: int) -> None:
    """From here on, allocating more bytes than this raises `MemoryError` (where the system counts them)."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def main(descriptor: str) -> None:
    """Serves one pool: loads its verifier, says so, then judges one (response, example) after another.

    Args:
      descriptor: the number of the inherited socket.
    """
    # Ctrl-C goes to the parent, which decides; a worker would only print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=int(descriptor))
    channel.set_inheritable(False)  # a verifier's own children must not hold the line open after we are gone
    stream = channel.makefile("rwb")

    def send(reply: dict) -> None:
        try:
            stream.write(frame(json.dumps(reply).encode()))
            stream.flush()
        except BrokenPipeError:
            os._exit(0)  # the parent has closed the line; what is still to be written has no reader

    def receive():
        header = stream.read(HEADER.size)
        if len(header) < HEADER.size:
            sys.exit(0)  # the parent has closed the line, or is gone
        return pickle.loads(stream.read(*HEADER.unpack(header)))

    spec, start_limit, item_limit = receive()
    # The parent enforces the limits. The alarm (default action: the kernel ends the process, whatever it is
    # stuck in) is for the day the parent itself was killed while we hung: no worker outlives it for long.
    signal.setitimer(signal.ITIMER_REAL, start_limit + 10)
    try:
        verify = spec.load()
        for module in spec.slow_imports:
            importlib.import_module(module)
        if spec.memory:
            _bound_memory(spec.memory)
    except UserError as error:
        send({"error": str(error)})
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    send({"ready": True})

    while True:
        response, example = receive()
        signal.setitimer(signal.ITIMER_REAL, item_limit + 10)
        try:
            verdict = verify(response, example)
        except (Exception, SystemExit) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
            verdict = infrastructure(f"verifier raised {text[:500]}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        send({"reward": verdict.reward, "outcome": verdict.outcome, "parts": verdict.parts})
