import concurrent.futures
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import red_team

from lpo_jax import rewards
from lpo_jax.errors import UserError
from lpo_jax.rewards import code, sandbox
from lpo_jax.rewards.sandbox import Sandbox

MISSING = {kind: sandbox.why_not(kind) for kind in sandbox.KINDS}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(reason), reason=f"no {kind} sandbox here: {reason}"))
    for kind, reason in MISSING.items()
]


@pytest.fixture(scope="module")
def attacks(tmp_path_factory):
    """Results of all attacks in a kind of sandbox, several at a time, because most of them wait for a limit."""
    done = {}

    def run(kind):
        if kind not in done:
            exploits = {n: e for n, e in red_team.EXPLOITS.items() if kind == "bubblewrap" or e.weak}
            folders = [tmp_path_factory.mktemp("attack") for _ in exploits]
            with concurrent.futures.ThreadPoolExecutor(4) as threads:
                results = threads.map(red_team.attack, exploits.values(), [kind] * len(folders), folders)
                done[kind] = dict(zip(exploits, results))
        return done[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_no_attack_pays_or_does_harm_or_is_masked(attacks, kind):
    results = attacks(kind)
    assert len(results) >= 40
    assert {name: result for name, result in results.items() if not result.withstood} == {}


@pytest.mark.parametrize("kind", KINDS)
def test_attacks_end_as_they_should_and_not_by_accident(attacks, kind):
    reasons = {name: result.verdict.parts["reason"] for name, result in attacks(kind).items()}
    for name in ("connect to the host", "start a program"):
        assert "Operation not permitted" in reasons[name]
    for name in ("sleep for ever", "hang while leaving", "a thread that stays", "outlive its timeout"):
        assert "out of time" in reasons[name]
    for name in ("10 GB at once", "raise its own limits"):
        assert "MemoryError" in reasons[name]
    if kind == "bubblewrap":
        assert (
            "No such file" in reasons["read the repository"]
            and "No such file" in reasons["read the task's files"]
        )


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("connect to the host", "connections to the host"),
        ("write outside of /tmp", "changed a file"),
        ("outlive its timeout", "left process"),
        ("read the task's files", None),
        ("send to a socket of the host", "to a socket of the host"),
        ("leave a socket behind", "wrote "),
        ("remove shared memory", "changed shared memory"),
        ("change a terminal", "changed the settings of a terminal"),
        ("change attributes of a file", "changed attributes of a file"),
    ],
)
def test_the_same_attacks_succeed_without_a_sandbox(tmp_path, monkeypatch, name, harm):
    """Otherwise the tests above could not fail."""
    monkeypatch.setattr(red_team, "HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    started = []

    def unprotected(response, example):
        command = [sys.executable, "-I", "-S", "-c", code.last_program(response)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(process)
        try:
            printed, _ = process.communicate(timeout=2.0 if name == "outlive its timeout" else 4.0)
        except subprocess.TimeoutExpired:
            printed = ""
        return rewards.as_verdict(float(printed.strip() == example["tests"]["outputs"][0]))

    try:
        result = red_team.attack(red_team.EXPLOITS[name], "", tmp_path, verify=unprotected)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert not result.withstood
    assert (result.verdict.reward == 1) if harm is None else any(harm in line for line in result.harm)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_sees_what_it_needs_and_nothing_else(kind):
    program = """
import os, sys
files = []
for number in range(200):
    try:
        os.fstat(number)
        files.append(number)
    except OSError:
        pass
print(files, sys.argv, __name__, input(), sys.stdin.read(), *os.environ)
"""
    with Sandbox(kind, program) as running:
        words = running.run("a\nb", seconds=5).output.decode().rpartition("b ")
    assert words[0] == "[0, 1, 2] ['solution.py'] __main__ a "
    assert set(words[2].split()) <= {"LC_CTYPE", "PWD", "PYTHONHASHSEED"}


def test_bubblewrap_holds_no_file_of_ours_and_no_process_of_others():
    if MISSING["bubblewrap"]:
        pytest.skip(MISSING["bubblewrap"])
    program = """
import os
print(os.getpid() < 5, os.getuid() != 0, os.path.exists("/proc"), os.path.exists("/etc/passwd"), os.access("/", 2))
open("/tmp/x", "w").write("mine")
print(open("/tmp/x").read())
print(*os.listdir("/"))
"""
    with Sandbox("bubblewrap", program) as running:
        facts, temporary, folders = running.run("", seconds=5).output.decode().splitlines()
    assert facts == "True True False False False" and temporary == "mine"
    needed = {path.split("/")[1] for path in (os.path.realpath(sys.base_prefix), sandbox._RUNNER)}
    assert set(folders.split()) <= {"usr", "bin", "lib", "lib32", "lib64", "etc", "dev", "tmp"} | needed


@pytest.fixture
def fresh_command():
    """The command of bubblewrap is cached; these tests clear the cache."""
    sandbox._bubblewrap.cache_clear()
    yield
    sandbox._bubblewrap.cache_clear()


@pytest.mark.parametrize("parent", ["/tmp", "/dev/shm", "/var/tmp"])
def test_bubblewrap_covers_no_runner_wherever_it_is_installed(monkeypatch, fresh_command, parent):
    if MISSING["bubblewrap"]:
        pytest.skip(MISSING["bubblewrap"])
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        runner = shutil.copy(sandbox._CHILD, folder)
        monkeypatch.setattr(sandbox, "_CHILD", runner)
        assert sandbox.why_not("bubblewrap") == ""
        with Sandbox(
            "bubblewrap", "import os\nprint(os.listdir('/tmp'), os.path.exists(input()))"
        ) as running:
            assert running.run(folder, seconds=5).output == b"['solution.py'] False\n"


def test_the_number_of_files_is_bounded():
    """Empty files take no space in a tmpfs, but a million of them take more than 1 GB of the kernel's memory."""
    if MISSING["bubblewrap"]:
        pytest.skip(MISSING["bubblewrap"])
    program = """
import os, threading
count, make = input().split()
def flood(name):
    for n in range(int(count)):
        getattr(os, make)(f"/tmp/{name}-{n}")
threads = [threading.Thread(target=flood, args=(name,)) for name in "ab"]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(os.listdir("/tmp")))
"""
    with Sandbox("bubblewrap", program) as running:
        assert running.run("2000 mknod", seconds=5).output == b"4001\n"
    for make in ("mknod", "mkdir"):
        with Sandbox("bubblewrap", program) as running:
            report = running.run(f"1000000 {make}", seconds=20)
            assert (report.status, report.detail) == ("error", "more than 10000 files in /tmp")
            if make == "mknod":
                assert running.run("1 mknod", seconds=20).detail.startswith("more than 10000 files")


@pytest.mark.parametrize("kind", KINDS)
def test_each_test_is_a_fresh_process_and_ends_as_python_does(kind):
    program = """
import atexit, builtins, sys, threading, time
seen = getattr(builtins, "seen", 0)
builtins.seen = seen + 1
atexit.register(print, "leaving")
left_open = open(1, "w", closefd=False)
left_open.write(f"{seen} {hash('a')} ")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
code = input()
if code:
    sys.exit(int(code))
"""
    with Sandbox(kind, program) as running:
        first, second, third = (running.run(given, seconds=5) for given in ("\n", "\n", "3\n"))
    assert first == second  # the order of a set and hashes are the same as in the previous run
    assert first.status == "ok" and first.output.startswith(b"thread\nleaving\n0 ")
    assert third.output == first.output
    assert (third.status, third.detail) == ("error", "exit 3")


@pytest.mark.parametrize("kind", KINDS)
def test_processor_time_and_the_clock_are_both_bounded(kind):
    with Sandbox(kind, "import time\nwhile True: time.sleep(float(input()))") as running:
        assert running.run("60\n", seconds=5, wall_seconds=0.3).detail == "on the clock"
    with Sandbox(kind, "while True: pass") as running:
        assert running.run("", seconds=0.2, wall_seconds=60).detail == "of processor time"
        assert running.run("", seconds=0.2, wall_seconds=60).status == "timeout"  # the sandbox still works


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outlives_a_killed_verifier(kind):
    mark, program = lingering()
    spec = rewards.VerifierSpec("code", {"sandbox": kind, "time_limit": 60.0})
    with (
        rewards.VerifierPool(spec, workers=1, timeout=60.0, allow_weak_sandbox=True) as pool,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        example = {"tests": {"inputs": [""], "outputs": ["x"]}}
        future = threads.submit(pool.verify, [f"```python\n{program}\n```"], [example])
        assert appears(mark)
        os.kill(pool.pids[0], signal.SIGKILL)
        assert future.result()[0].masked
        assert vanishes(mark)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_nothing_outlives_a_runner_that_dies_or_hangs(kind, number, monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE", 0.2)
    monkeypatch.setattr(sandbox, "_PARTING", 0.2)
    mark, program = lingering()
    with Sandbox(kind, program) as running, concurrent.futures.ThreadPoolExecutor(1) as threads:
        future = threads.submit(running.run, "", seconds=60, wall_seconds=1.0)
        assert appears(mark)
        runner = running._process.pid
        if kind == "bubblewrap":
            with open(f"/proc/{runner}/task/{runner}/children") as children:
                runner = int(children.read())
        os.kill(runner, number)
        status = future.result().status  # counts against the program
        assert status == ("lost" if number == signal.SIGKILL else "timeout")
        assert running.run("", seconds=1).status == "lost"
        assert vanishes(mark)
        assert _within_five_seconds(lambda: ended(runner))


HERE = {"socket_file": "", "shared_memory": 0, "terminal": ""}


def lingering():
    """Return a mark, and a program that carries it and never ends, even if its parent dies."""
    mark = "m" + secrets.token_hex(5)
    prelude = red_team.PRELUDE.format(mark=mark, secret_file="", home="", port=0, **HERE)
    return mark, f"{prelude}\nlibc.prctl(1, 0)\n{red_team.LINGER}\nlinger()"


def ended(pid):
    """Return whether a process has ended, or is a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def appears(mark):
    return _within_five_seconds(lambda: red_team.marked_processes(mark))


def vanishes(mark):
    return _within_five_seconds(lambda: not red_team.marked_processes(mark))


def _within_five_seconds(happened):
    deadline = time.monotonic() + 5.0
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(happened())


def test_without_bubblewrap_programs_run_only_where_that_is_allowed(monkeypatch):
    monkeypatch.setattr(
        sandbox, "why_not", lambda kind: "bwrap is not installed" if kind == "bubblewrap" else ""
    )
    spec = rewards.VerifierSpec("code")
    with pytest.raises(UserError, match=r"bwrap is not installed.*rewards\.allow_weak_sandbox") as error:
        rewards.VerifierPool(spec, workers=1)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="bwrap is not installed"):
        rewards.get("code")("```python\nprint(1)\n```", {"tests": {"inputs": [""], "outputs": ["1"]}})
    confined, kind = spec.confined(allow_weak=True, timeout=10.0)
    assert kind == "weak" and confined.options["sandbox"] == "weak"
    monkeypatch.setattr(sandbox, "why_not", lambda kind: "no seccomp")
    with pytest.raises(UserError, match="not even weakly: no seccomp"):
        spec.confined(allow_weak=True, timeout=10.0)


def test_the_weak_sandbox_is_not_to_be_had_by_a_task_alone(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda kind: "")
    spec = rewards.VerifierSpec("code", {"sandbox": "weak"})
    with pytest.raises(UserError, match=r"rewards\.allow_weak_sandbox"):
        spec.confined(allow_weak=False, timeout=10.0)
    assert rewards.VerifierSpec("code").confined(allow_weak=True, timeout=10.0)[1] == "bubblewrap"
    other = rewards.VerifierSpec("countdown")
    assert other.confined(allow_weak=False, timeout=1.0) == (other, "")


def test_a_program_out_of_time_is_scored_before_the_pool_would_mask_it(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda kind: "")
    spec = rewards.VerifierSpec("code")
    assert spec.confined(allow_weak=False, timeout=30.0)[0].options["total_limit"] == 28.0
    with pytest.raises(UserError, match=r"rewards.timeout = 2: .* at least 3 seconds"):
        spec.confined(allow_weak=False, timeout=2.0)
    long = rewards.VerifierSpec("code", {"total_limit": 20.0})
    with pytest.raises(UserError, match="at least 22 seconds"):
        long.confined(allow_weak=False, timeout=10.0)


@pytest.mark.parametrize("broken", ["not there", "fails"])
def test_a_sandbox_that_does_not_come_up_masks_the_sample(monkeypatch, tmp_path, broken):
    program = tmp_path / "bwrap"
    if broken == "fails":
        program.write_text("#!/bin/sh\necho bwrap: no permission >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda: [str(program)])
    reason = sandbox.why_not("bubblewrap")
    assert reason == (
        "bwrap: no permission" if broken == "fails" else f"{program}: No such file or directory"
    )
    monkeypatch.setattr(sandbox, "choose_kind", lambda kind, allow_weak: kind)
    verdict = rewards.get("code")("```python\nprint(1)\n```", {"tests": {"inputs": [""], "outputs": ["1"]}})
    assert verdict.masked and reason in verdict.parts["reason"]


def test_without_a_bwrap_on_the_path(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    sandbox._bubblewrap.cache_clear()
    assert sandbox.why_not("bubblewrap") == "bwrap is not installed"
    monkeypatch.undo()
    assert sandbox.why_not("bubblewrap") == MISSING["bubblewrap"]
