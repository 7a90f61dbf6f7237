"""The program that a worker process runs, and the messages that it exchanges with the pool.

Requests are pickles, because the parent is trusted and rows hold any Python value. Replies are JSON, so that the
trainer never unpickles data from a process that has handled a model's text. Both are preceded by their length. Every
request has a token, which its reply repeats. A verifier can also write to the socket, by mistake (a fork that returns
twice) or on purpose, so the pool checks each reply before it counts (`parse_reply`).
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
from lpo_jax.rewards.user_code import innermost_frame, split_reference
from lpo_jax.rewards.verdict import Verdict, infrastructure, unusable
from lpo_jax.types import Json

HEADER = struct.Struct("!Q")
MAX_REPLY = 16 << 20  # bytes; the pool reads no longer reply into memory


def frame(payload: bytes) -> bytes:
    """Prefix a payload with its length."""
    return HEADER.pack(len(payload)) + payload


def parse_reply(payload: bytes) -> tuple[str, Verdict | str | None]:
    """Parse the payload of a reply.

    Returns:
      The token, and the content: a verdict, the error that kept a worker from starting, or None (the worker is ready).

    Raises:
      ValueError: if the payload is not a reply.
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


class _Channel:
    """The worker's end of the socket to the pool.

    Args:
      descriptor: the number of the inherited socket.
    """

    def __init__(self, descriptor: int):
        channel = socket.socket(fileno=descriptor)
        # A verifier's child processes must not keep the socket open after the worker has ended, nor write to it.
        channel.set_inheritable(False)
        os.register_at_fork(after_in_child=lambda: os.close(channel.fileno()))
        self._stream, self._own_pid = channel.makefile("rwb"), os.getpid()

    def send(self, token: str, **reply) -> None:
        """Send the reply to the request with that token."""
        if os.getpid() != self._own_pid:
            os._exit(0)  # a fork that returned from the verifier: only the worker itself replies
        payload = json.dumps({"token": token, **reply}).encode()
        if len(payload) > MAX_REPLY:
            refused = infrastructure(f"a verdict of {len(payload)} bytes; the limit is {MAX_REPLY}")
            payload = json.dumps({"token": token, **vars(refused)}).encode()
        try:
            self._stream.write(frame(payload))
            self._stream.flush()
        except OSError:
            # The parent or the verifier has closed the socket: nobody will read what remains to be written.
            os._exit(0)

    def receive(self) -> Json:
        """Return the next request; exit once the parent has closed the socket."""
        return pickle.loads(self._read(*HEADER.unpack(self._read(HEADER.size))))

    def _read(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except OSError:  # connection reset: the parent ended without reading the last reply
            data = b""
        if len(data) < size:
            sys.exit(0)  # the parent has closed the socket or has ended
        return data


def _limit_memory(limit: int) -> None:
    """Make allocations beyond `limit` bytes raise `MemoryError`, where the system counts them."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def run_worker(descriptor: str) -> None:
    """Serve one pool: load its verifier, report ready, then judge one (response, example) after another.

    Args:
      descriptor: the number of the inherited socket.
    """
    # Ctrl-C is the parent's to handle; a worker would only print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = _Channel(int(descriptor))
    token, spec, start_limit, item_limit = channel.receive()
    # The parent enforces the limits. The alarm (default action: the kernel ends the process, whatever blocks it)
    # covers the case that the parent itself was killed while the worker hung: no worker outlives it for long.
    signal.setitimer(signal.ITIMER_REAL, start_limit + 10)
    try:
        verify = spec.load()
        for module in spec.descriptor.slow_imports:
            importlib.import_module(module)
        if spec.descriptor.memory:
            _limit_memory(spec.descriptor.memory)
    except UserError as error:
        channel.send(token, error=str(error))
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    channel.send(token, ready=True)

    file, _ = split_reference(spec.source) or (None, None)
    while True:
        token, response, example = channel.receive()
        signal.setitimer(signal.ITIMER_REAL, item_limit + 10)
        try:
            verdict = verify(response, example)
        except (Exception, SystemExit) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
            verdict = infrastructure(f"verifier raised {text[:500]} ({innermost_frame(error, file)})")
        signal.setitimer(signal.ITIMER_REAL, 0)
        channel.send(token, reward=float(verdict.reward), outcome=verdict.outcome, parts=verdict.parts)
