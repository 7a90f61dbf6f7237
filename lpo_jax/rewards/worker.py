"""The program that a pool's worker process runs, and the messages it exchanges with the pool.

Requests are pickles (the parent is trusted, and rows hold any Python value); replies are JSON, so that the
trainer never unpickles what comes from a process that has handled a model's text. Both are led by their
length. Every request has a token, which its reply repeats: a verifier can write to the socket too, by mistake
(a fork that returns twice) or on purpose, so the pool checks each reply before it counts (`parse_reply`).
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
from lpo_jax.rewards.user_code import place, split_reference
from lpo_jax.rewards.verdict import Verdict, infrastructure, unusable

HEADER = struct.Struct("!Q")
MAX_REPLY = 16 << 20  # bytes; the pool keeps no longer reply in memory


def frame(payload: bytes) -> bytes:
    """A payload led by its length."""
    return HEADER.pack(len(payload)) + payload


def parse_reply(payload: bytes) -> tuple[str, Verdict | str | None]:
    """The token of a reply, and what it holds: a verdict, the error that kept a worker from starting, or None (ready).

    Raises:
      ValueError: if it is anything else.
    """
    try:
        reply = json.loads(payload)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    match reply:
        case {"token": str(token), "ready": True, **rest} if not rest:
            return token, None
        case {"token": str(token), "error": str(error), **rest} if not rest:
            return token, error
        case {
            "token": str(token),
            "reward": float(reward),
            "outcome": str(outcome),
            "parts": dict(parts),
            **rest,
        } if not rest and all(isinstance(value, str | int | float) for value in parts.values()):
            reason = unusable(reward)
            return token, infrastructure(reason) if reason else Verdict(reward, outcome, parts)
    raise ValueError("not the fields of a reply")


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
    os.register_at_fork(after_in_child=lambda: os.close(channel.fileno()))  # nor write to it
    stream, own_pid = channel.makefile("rwb"), os.getpid()

    def send(token: str, **reply) -> None:
        if os.getpid() != own_pid:
            os._exit(0)  # a fork that has returned from the verifier: only the worker itself replies
        payload = json.dumps({"token": token, **reply}).encode()
        if len(payload) > MAX_REPLY:
            refused = infrastructure(f"a verdict of {len(payload)} bytes; the limit is {MAX_REPLY}")
            payload = json.dumps({"token": token, **vars(refused)}).encode()
        try:
            stream.write(frame(payload))
            stream.flush()
        except OSError:
            # The parent has closed the line, or the verifier has: what is still to be written has no reader.
            os._exit(0)

    def read(size: int) -> bytes:
        try:
            data = stream.read(size)
        except OSError:  # reset: the parent has ended without reading our last reply
            data = b""
        if len(data) < size:
            sys.exit(0)  # the parent has closed the line, or is gone
        return data

    def receive():
        return pickle.loads(read(*HEADER.unpack(read(HEADER.size))))

    token, spec, start_limit, item_limit = receive()
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
        send(token, error=str(error))
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    send(token, ready=True)

    file, _ = split_reference(spec.source) or (None, None)
    while True:
        token, response, example = receive()
        signal.setitimer(signal.ITIMER_REAL, item_limit + 10)
        try:
            verdict = verify(response, example)
        except (Exception, SystemExit) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
            verdict = infrastructure(f"verifier raised {text[:500]} ({place(error, file)})")
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(token, reward=float(verdict.reward), outcome=verdict.outcome, parts=verdict.parts)
