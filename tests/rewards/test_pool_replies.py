"""Replies of worker processes are checked: forks, junk and forgeries do not crash the trainer or count as verdicts."""

import json
import math
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpo_jax import rewards
from lpo_jax.rewards import Verdict, VerifierPool, VerifierSpec
from lpo_jax.rewards.worker import HEADER, MAX_REPLY, frame, parse_reply
from lpo_jax.rewards.worker_process import BadReply, WorkerProcess

VERIFIER = """
import ctypes, os, stat, sys, threading, time
from lpo_jax.rewards import Verdict
from lpo_jax.rewards.worker import frame

def line():
    return next(n for n in range(3, 64) if os.path.exists(f"/proc/self/fd/{n}") and stat.S_ISSOCK(os.fstat(n).st_mode))

def token():
    frame = sys._getframe()
    while "token" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["token"]

def claim(token):
    return frame(b'{"token": "%s", "reward": 7.0, "outcome": "pass", "parts": {}}' % token.encode())

def verify(response, example):
    command, _, argument = response.partition(" ")
    if command == "fork":  # two processes return from here
        os.fork()
    if command == "fork-in-c":  # the same, without Python noticing
        ctypes.CDLL(None).fork()
    if command == "child-raises" and os.fork() == 0:
        raise ValueError("in the child")
    if command == "child-writes" and os.fork() == 0:
        os.write(line(), claim(token()))
    if command == "junk":
        os.write(line(), bytes.fromhex(argument))
    if command == "forge":
        nonce, number = token().split(":")
        os.write(line(), claim({"other": "0:1", "next": f"{nonce}:{int(number) + 1}", "zero": f"{nonce}:0",
                                "text": f"{nonce}:x"}[argument]))
    if command == "twice":
        os.write(line(), claim(token()))
    if command == "thread":  # a second reply, long after the first was received
        reply, own = claim(token()), line()
        threading.Thread(target=lambda: (time.sleep(0.2), os.write(own, reply))).start()
    if command == "close":
        os.closerange(3, 256)
    if command == "large":
        return Verdict(1.0, "pass", {"text": "x" * int(argument)})
    if command == "sleep":
        time.sleep(float(argument.split()[0]))
    if command == "reward":
        return float(argument)
    return float(response.endswith("1"))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("verifier") / "verifier.py"
    file.write_text(VERIFIER)
    return f"{file}:verify"


def outcomes(pool, *responses):
    return [verdict.outcome for verdict in pool.verify(list(responses), [{}] * len(responses))]


@pytest.mark.parametrize("how", ["fork", "fork-in-c", "child-raises", "child-writes"])
def test_a_verifier_that_forks_gives_one_verdict(source, how):
    with VerifierPool(source, workers=1) as pool:
        before = pool.pids
        assert outcomes(pool, "1", f"{how} 1", "0", "1", f"{how} 0", "0") == [
            "pass",
            "pass",
            "wrong",
            "pass",
            "wrong",
            "wrong",
        ]
        assert pool.pids == before


BAD = {
    "text": b"a line of text\n",
    "nothing in it": frame(b""),
    "no JSON": frame(b"{"),
    "too deep": frame(b"[" * 4000),
    "a huge length": HEADER.pack(1 << 60),
    "a length that takes in the reply": HEADER.pack(200),
    "another's token": "other",
    "the next token": "next",
}


def test_a_damaged_or_forged_reply_masks_the_sample_and_ends_the_worker(source):
    with VerifierPool(source, workers=1, timeout=1.0) as pool:
        for case, data in BAD.items():
            response = f"forge {data}" if isinstance(data, str) else f"junk {data.hex()}"
            (before,) = pool.pids
            (bad,) = pool.verify([response], [{}])
            assert bad.masked, case
            assert bad.parts["reason"].startswith(("the worker's reply is damaged", "wall-clock")), case
            assert pool.pids != [before] and not os.path.exists(f"/proc/{before}"), case
        assert outcomes(pool, "1", "0") == ["pass", "wrong"]


def test_surplus_replies_cost_no_other_sample(source, caplog):
    with VerifierPool(source, workers=1) as pool:
        (before,) = pool.pids
        first, *rest = pool.verify(["twice 1", "0", "0", "1"], [{}] * 4)
        assert first.reward == 7.0  # the verifier's process cannot be distinguished from the verifier
        assert [verdict.outcome for verdict in rest] == ["wrong", "wrong", "pass"]
        assert pool.pids != [before]
        (before,) = pool.pids
        assert outcomes(pool, "thread 1", "sleep 0.6 0", "0", "1") == ["pass", "wrong", "wrong", "pass"]
        assert pool.pids != [before]
    assert "replied more than once" in caplog.text


def test_a_worker_without_its_line_and_one_with_too_much_to_say(source):
    with VerifierPool(source, workers=1) as pool:
        closed, large, fits, good = pool.verify(
            ["close", f"large {MAX_REPLY}", "large 9000000", "1"], [{}] * 4
        )
    assert closed.masked and "worker died" in closed.parts["reason"]
    assert large.masked and "a verdict of 16777" in large.parts["reason"]
    assert (fits.outcome, len(fits.parts["text"]), good.outcome) == ("pass", 9_000_000, "pass")


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("1e39", "the reward 1e+39, which is beyond the range of float32"),
        ("-3.5e38", "beyond the range of float32"),
        ("inf", "the reward inf, which is not finite"),
        ("-inf", "not finite"),
        ("nan", "not finite"),
        ("3.4e38", None),
        ("1e-60", None),
    ],
)
def test_rewards_that_float32_does_not_hold_are_masked(source, reward, reason):
    for verdict in (rewards.as_verdict(float(reward)), rewards.as_verdict(Verdict(float(reward), "pass"))):
        assert verdict.masked == bool(reason)
        assert verdict.reward == (0.0 if reason else float(reward))
        assert not reason or reason in verdict.parts["reason"]
    reply = {"token": "t", "reward": float(reward), "outcome": "pass", "parts": {}}
    token, verdict = parse_reply(json.dumps(reply).encode())  # the only check of built-in verifiers
    assert token == "t" and verdict.masked == bool(reason)
    if reward == "1e39":
        with VerifierPool(source, workers=1) as pool:
            assert outcomes(pool, "reward 1e39", "1") == ["infrastructure", "pass"]


SCRIPT = """
import sys
from lpo_jax.rewards import VerifierPool
with VerifierPool(sys.argv[1], workers=4, timeout=2.0) as pool:
    print("ready", flush=True)
    responses = ["sleep 0.5 1", "sleep 0.6 1", "large 9000000", "large 9000000", "1", "0"]
    print(*(verdict.outcome for verdict in pool.verify(responses, [{}] * 6)), flush=True)
"""


def test_what_was_answered_while_the_trainer_was_stopped_counts(source):
    """After SIGSTOP and SIGCONT, all deadlines have passed when the trainer continues, but the replies have arrived."""
    command = [sys.executable, "-c", SCRIPT, source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        try:
            assert trainer.stdout.readline() == "ready\n"
            time.sleep(0.1)
            trainer.send_signal(signal.SIGSTOP)
            time.sleep(3.0)
            trainer.send_signal(signal.SIGCONT)
            assert trainer.stdout.readline().split() == ["pass"] * 5 + ["wrong"]
        finally:
            trainer.kill()


def test_any_mixture_of_faults(source):
    """Good responses are always judged correctly; bad ones never earn more than their verifier returned."""
    dice = random.Random(0)
    kinds = [f"fork {n % 2}" for n in range(2)] + [
        "junk " + dice.randbytes(dice.randrange(1, 40)).hex() for _ in range(5)
    ]
    kinds += ["junk " + frame(dice.randbytes(dice.randrange(40))).hex() for _ in range(4)]
    kinds += ["forge other", "forge next", "close", "fork-in-c 1", "reward nan"]
    responses = kinds + [str(dice.randrange(2)) for _ in range(60)]
    dice.shuffle(responses)
    with VerifierPool(source, workers=3, timeout=3.0) as pool:
        verdicts = pool.verify(responses, [{}] * len(responses))
        assert len(set(pool.pids)) == 3
        assert outcomes(pool, "1", "0", "1") == ["pass", "wrong", "pass"]
    for response, verdict in zip(responses, verdicts):
        if response[0] in "01" or response.startswith("fork"):
            assert verdict.reward == float(response[-1]) and not verdict.masked
        else:
            assert verdict.masked


@pytest.mark.parametrize("moment", ["idle", "reply not read", "inside a request"])
def test_a_worker_whose_pool_is_gone_ends_in_silence(source, capfd, moment):
    worker = WorkerProcess(VerifierSpec(source), 60.0, 10.0)
    if moment == "reply not read":
        # The reply stays unread, so that closing the socket resets the connection.
        select.select([worker.socket], [], [], 60)
    else:
        while not worker.unread:
            select.select([worker.socket], [], [], 60)
            worker.receive()
    if moment == "inside a request":
        worker.socket.send(frame(b"x" * 100)[:50])
    worker.socket.close()
    assert worker.process.wait(60) == 0
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def worker():
    """A worker whose socket is controlled by the test."""
    worker = object.__new__(WorkerProcess)
    worker.socket, theirs = socket.socketpair()
    worker.socket.setblocking(False)
    with worker.socket, theirs:
        yield worker, theirs


_REPLIES = st.fixed_dictionaries(
    {},
    optional={
        "token": st.sampled_from(["n:1", "n:2", "n:3", "m:2", ":", "n:-1", "n:2\u0662"]) | st.integers(),
        "reward": st.floats() | st.integers() | st.text(),
        "outcome": st.sampled_from(["pass", "wrong", "infrastructure", "fine", 1, None]),
        "parts": st.dictionaries(st.text(), st.text() | st.floats() | st.lists(st.none())) | st.none(),
        "ready": st.booleans(),
        "error": st.text() | st.none(),
    },
)


@given(
    st.lists(
        st.binary(max_size=30)
        | st.binary(max_size=30).map(frame)
        | _REPLIES.map(lambda reply: frame(json.dumps(reply).encode())),
        max_size=4,
    )
)
def test_no_bytes_on_the_line_are_more_than_a_bad_reply(worker, parts):
    worker, theirs = worker
    worker.unread, worker.suspect = bytearray(), False
    worker._nonce, worker._requests, worker._open, worker.deadline = "n", 2, True, 0.0
    theirs.send(b"".join(parts))
    assert worker.receive()
    try:
        reply = worker.reply()
    except BadReply:
        return
    if reply and isinstance(reply[0], Verdict):
        assert math.isfinite(reply[0].reward) and abs(reply[0].reward) < 3.5e38
        assert frame(json.dumps("n:2").encode())[8:] in b"".join(parts)
    assert worker.suspect or not reply or not worker.unread
