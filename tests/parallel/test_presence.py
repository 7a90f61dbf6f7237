"""Messages about other processes, with a fake store, and with two real processes, one of which dies."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lpo_jax.errors import UserError
from lpo_jax.parallel import hosts, presence
from lpo_jax.parallel.presence import SILENCE, Presence

ROOT = Path(__file__).parents[2]


class Store(dict):
    def key_value_set(self, key, value, allow_overwrite):
        self[key] = value

    def key_value_dir_get(self, folder):
        return list(self.items())


@pytest.fixture
def pair(monkeypatch):
    """Two processes on one store, a clock, and the exit statuses of the first."""
    monkeypatch.setattr(presence, "BEAT", 0.0)
    store, now, ended = Store(), [0.0], []
    one = Presence(store, 0, 2, end=ended.append, clock=lambda: now[0])
    other = Presence(store, 1, 2, end=ended.append, clock=lambda: now[0])
    return one, other, now, ended


def test_a_process_that_ends_with_an_error_ends_the_others_with_its_reason(pair, capsys):
    one, other, _, ended = pair
    one.beat()
    other.phase = "verifying"
    other.beat()
    one.beat()
    assert not ended and not capsys.readouterr().err
    other.leave("verifier v: its worker does not start")
    one.beat()
    assert ended == [1]
    expected = "ended while it was verifying: verifier v: its worker does not start; so this one ends too"
    assert capsys.readouterr().err == f"lpo: process 1 of 2 {expected}\n"


def test_a_process_with_an_error_waits_until_the_others_know_it(pair, monkeypatch, capsys):
    """The store may end with it, and a busy machine delays the others' heartbeats."""
    one, other, _, ended = pair
    one.beat()
    beats = iter([lambda: None, lambda: None, lambda: None, one.beat])
    monkeypatch.setattr(presence.time, "sleep", lambda seconds: next(beats)())
    other.leave("a reason")
    assert ended == [1] and list(beats) == []
    assert "a reason" in capsys.readouterr().err


def test_a_process_that_falls_silent_is_named_once_and_one_that_has_done_its_part_is_not(pair, capsys):
    one, other, now, ended = pair
    other.phase = "learning"
    other.beat()
    one.beat()
    now[0] += SILENCE
    one.beat()
    assert not capsys.readouterr().err  # not yet
    other.beat()
    one.beat()
    for _ in range(5):
        now[0] += SILENCE / 2 + 1
        one.beat()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not ended
    assert said.startswith(
        "lpo: process 1 of 2 has sent no heartbeat for 10 s and was learning in its last one"
    )

    third = Presence(one._store, 1, 2, clock=lambda: now[0])
    third.leave()
    one.beat()
    now[0] += 10 * SILENCE
    one.beat()
    assert not capsys.readouterr().err and not ended


@pytest.mark.parametrize("platform", ["nonsense", "cuda"])
def test_a_platform_that_is_not_here_is_one_line(platform):
    program = "from lpo_jax.commands.main import main; raise SystemExit(main(['sample', '/nowhere', 'x']))"
    command, env = [sys.executable, "-c", program], os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = done.stderr.strip().split("\n")
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith(f"lpo: JAX_PLATFORMS = {platform}: cannot be used here (")
    assert lines[0].endswith("; available is cpu: set it to that, or unset it")


def test_the_platform_that_is_here_is_taken():
    hosts.require_devices()


PROGRAM = """
    import sys, time
    from lpo_jax.errors import RunStopped
    from lpo_jax.parallel import hosts
    hosts.connect()
    hosts.phase("verifying")
    with hosts.together():
        print("ready", flush=True)
        sys.stdin.readline()
        if sys.argv[1:]:
            raise RunStopped("step 3: the verifier failed on all 8 responses")
        time.sleep(100)
"""


def two_processes(*arguments_of_each):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    jobs = []
    for i, arguments in enumerate(arguments_of_each):
        many = {"LPO_COORDINATOR": address, "LPO_NUM_PROCESSES": "2", "LPO_PROCESS_ID": str(i)}
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        jobs.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | many, text=True, **pipes))
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    time.sleep(3)  # until each has seen a heartbeat of the other
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize("ends", [0, 1])
def test_the_other_process_says_why_one_ended_in_verification(ends):
    jobs = two_processes(*(["error"] if i == ends else [] for i in range(2)))
    jobs[ends].stdin.write("go on\n")
    jobs[ends].stdin.flush()
    (jobs[1 - ends].stdin.write("go on\n"), jobs[1 - ends].stdin.flush())
    error = jobs[1 - ends].communicate(timeout=60)[1]
    expected = f"lpo: process {ends} of 2 ended while it was verifying: step 3: the verifier failed on all 8 responses"
    assert jobs[1 - ends].returncode == 1 and error.startswith(expected) and error.count("\n") == 1
    assert f"process {ends} of 2 stops: step 3" in jobs[ends].communicate(timeout=60)[1]


@pytest.mark.slow
def test_the_other_process_says_which_was_killed_in_verification():
    jobs = two_processes([], [])
    jobs[1].send_signal(signal.SIGKILL)
    jobs[0].stdin.write("go on\n")
    jobs[0].stdin.flush()
    error = jobs[0].communicate(timeout=120)[1]
    assert jobs[0].returncode != 0
    assert error.startswith(
        "lpo: process 1 of 2 has sent no heartbeat for 10 s and was verifying in its last one"
    )


def test_an_error_of_the_only_process_goes_its_usual_way():
    with pytest.raises(UserError), hosts.together():
        raise UserError("a mistake")
