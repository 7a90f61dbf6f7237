import os
import signal
import subprocess
import sys
import time

import pytest

from lpo_jax import rewards
from lpo_jax.errors import UserError
from lpo_jax.rewards import Verdict, VerifierPool

VERIFIER = """
import math, os, re, signal, subprocess, sys, time
from lpo_jax.rewards import Verdict

def verify(response, example):
    print("a stray print", flush=True)
    os.write(1, b"a stray write\\n")
    command, _, argument = response.partition(" ")
    if command == "hang":
        time.sleep(600)
    if command == "hang-in-c":  # holds the GIL: no Python thread or signal handler can end it
        re.match(r"(a+)+$", "a" * 60 + "b")
    if command == "ignore-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if command == "child":
        child = subprocess.Popen(["sleep", "600"])
        open(argument, "w").write(str(child.pid))
        time.sleep(600)
    if command == "die":
        os._exit(3)
    if command == "orphan":
        os.system("sleep 600 & echo $! > " + argument)
        os._exit(3)
    if command == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if command == "exit":
        sys.exit(0)
    if command == "raise":
        raise ValueError("two\\nlines")
    if command == "input":
        return float(input())
    if command == "return":
        return {"nan": math.nan, "text": "1.0", "none": None, "inf": Verdict(math.inf, "pass")}[argument]
    if command == "echo":
        return Verdict(0.0, "wrong", {"text": argument, "length": len(response)})
    if command == "where":
        return Verdict(1.0, "pass", {"pid": os.getpid(), "jax": "jax" in sys.modules,
                                     "platforms": os.environ["JAX_PLATFORMS"]})
    return float(example["answer"] == int(response))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("verifier") / "verifier.py"
    file.write_text(VERIFIER)
    return f"{file}:verify"


def judge(pool, *responses):
    return pool.verify(list(responses), [{"answer": 1}] * len(responses))


def running(pid):
    """Return whether the process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, within=5.0):
    deadline = time.monotonic() + within
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(running, pids))


def unreaped(pid):
    """Return whether a child process is still in the process table, dead or alive."""
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


def test_order_is_kept_and_worker_count_does_not_matter(source):
    responses = [str(i % 3) if i % 5 else f"echo {i}" for i in range(60)] + ["raise", "return nan"]
    examples = [{"answer": i % 2} for i in range(len(responses))]
    results = []
    for workers in (1, 3):
        with VerifierPool(source, workers=workers) as pool:
            results.append(pool.verify(responses, examples))
            assert pool.verify(responses, examples) == results[-1]
            assert pool.verify([], []) == []
    assert results[0] == results[1]
    for i, verdict in enumerate(results[0][:60]):
        if i % 5:
            assert verdict.reward == float(i % 3 == i % 2)
        else:
            assert verdict.parts["text"] == str(i)


def test_built_in_verifier_gives_the_same_in_the_pool():
    example = {"numbers": (3, 5, 2), "target": 16}
    responses = ["(3+5)*2</answer>", "3+5+2</answer>", "no", "9**9**9**9</answer>", "3+\ud800</answer>"]
    spec = rewards.VerifierSpec("countdown", {"scores": [1, 0.2, -1]}, prefill="<answer>")
    with VerifierPool(spec, workers=2) as pool:
        verdicts = pool.verify(responses, [example] * len(responses))
    assert verdicts == [spec.load()(response, example) for response in responses]
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.2, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("how", [pytest.param("hang", marks=pytest.mark.slow), "hang-in-c", "ignore-sigterm"])
def test_hanging_is_cut_off_masked_and_replaced(source, how):
    with VerifierPool(source, workers=2, timeout=1.0) as pool:
        before = pool.pids
        started = time.monotonic()
        verdicts = judge(pool, "1", how, "0", "1")
        assert time.monotonic() - started < 1.0 + 4.0
        assert [verdict.outcome for verdict in verdicts] == ["pass", "infrastructure", "wrong", "pass"]
        assert verdicts[1] == Verdict(0.0, "infrastructure", {"reason": "wall-clock limit of 1 s"})
        assert verdicts[1].masked and not verdicts[0].masked
        assert len(set(pool.pids) - set(before)) == 1 and len(pool.pids) == 2
        killed = (set(before) - set(pool.pids)).pop()
        assert not unreaped(killed)
        assert [verdict.outcome for verdict in judge(pool, "1", "0")] == ["pass", "wrong"]


def _fault(response):
    """Part of the line that an error names: where it was raised, or the function that returned an invalid reward."""
    raised = {"exit": "sys.exit(0)", "raise": "raise ValueError", "input": "float(input())"}
    return raised.get(response, "def verify(")


FAILURES = {
    "die": "worker died (exit 3)",
    "kill": "worker died (exit -9)",
    "exit": "verifier raised SystemExit: 0",
    "raise": "verifier raised ValueError: two lines",
    "input": "verifier raised EOFError: EOF when reading a line",
    "return nan": "verifier returned the reward nan, which is not finite",
    "return inf": "verifier returned the reward inf, which is not finite",
    "return text": "verifier returned str, not a number or a Verdict",
    "return none": "verifier returned NoneType, not a number or a Verdict",
}


def test_failures_are_masked_with_their_reason(source):
    file = source.rpartition(":")[0]
    with VerifierPool(source, workers=1) as pool:
        for response, reason in FAILURES.items():
            before, verdict, after = judge(pool, "1", response, "1")
            if not reason.startswith("worker"):  # of which only the exit status is known
                lines = enumerate(VERIFIER.split("\n"), 1)
                number = next(i for i, line in lines if _fault(response) in line)
                reason += f" ({file}, line {number})"
            assert verdict == Verdict(0.0, "infrastructure", {"reason": reason})
            assert [before.outcome, after.outcome] == ["pass", "pass"], response


def test_stray_prints_stay_out_of_the_protocol_and_of_stdout(source, capfd):
    with VerifierPool(source, workers=1) as pool:
        assert judge(pool, "1")[0].outcome == "pass"
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "a stray print" in printed.err and "a stray write" in printed.err


@pytest.mark.parametrize("workers, rounds", [(2, 1), pytest.param(6, 12, marks=pytest.mark.slow)])
def test_many_hanging_or_dying_in_a_row(source, workers, rounds):
    """Fifteen in a row replace every worker six times; those of the slow case take half a minute of processor time."""
    with VerifierPool(source, workers=workers, timeout=0.25) as pool:
        every = set(pool.pids)
        for _ in range(rounds):
            verdicts = judge(pool, *(["hang", "die", "raise", "die", "die"] * 3))
            assert all(verdict.masked for verdict in verdicts)
            assert len(set(pool.pids)) == workers
            every |= set(pool.pids)
        good = judge(pool, *["1"] * 12)
        assert sum(verdict.outcome == "pass" for verdict in good) >= 11  # 0.25 s is short on a busy machine
        every |= set(pool.pids)
    assert not any(map(unreaped, every))


def test_what_a_hanging_verifier_started_is_killed_with_it(source, tmp_path):
    note = tmp_path / "pid"
    with VerifierPool(source, workers=1, timeout=2.0) as pool:
        assert judge(pool, f"child {note}")[0].masked
        assert gone([int(note.read_text())])


def test_a_dead_worker_is_noticed_though_what_it_started_lives_on(source, tmp_path):
    note = tmp_path / "pid"
    with VerifierPool(source, workers=1, timeout=60.0) as pool:
        assert judge(pool, f"orphan {note}")[0].parts == {"reason": "worker died (exit 3)"}
        assert gone([int(note.read_text())])


def test_workers_are_recycled(source):
    with VerifierPool(source, workers=2, recycle_after=3) as pool:
        verdicts = judge(pool, *["where"] * 10)
        assert len(pool.pids) == 2
    served = [verdict.parts["pid"] for verdict in verdicts]
    assert max(served.count(pid) for pid in served) <= 3 and len(set(served)) >= 4


def test_workers_are_on_the_cpu_and_do_not_import_jax(source):
    with VerifierPool(source, workers=1) as pool:
        parts = judge(pool, "where")[0].parts
        assert parts["pid"] == pool.pids[0] != os.getpid()
    assert parts["jax"] == 0.0 and parts["platforms"] == "cpu"


def test_messages_larger_than_any_buffer(source):
    with VerifierPool(source, workers=2) as pool:
        verdicts = judge(pool, *("echo " + letter * 3_000_000 for letter in "abc"))
    assert [verdict.parts["text"][-1] for verdict in verdicts] == ["a", "b", "c"]
    assert {verdict.parts["length"] for verdict in verdicts} == {3_000_005.0}


def test_a_worker_that_does_not_read_does_not_stop_the_parent(source):
    with VerifierPool(source, workers=1, timeout=1.0) as pool:
        os.kill(pool.pids[0], signal.SIGSTOP)
        verdict = judge(pool, "echo " + "a" * 3_000_000)[0]
        assert verdict.parts == {"reason": "wall-clock limit of 1 s"}
        assert judge(pool, "1")[0].outcome == "pass"


def test_ctrl_c_does_not_reach_workers(source):
    with VerifierPool(source, workers=2) as pool:
        before = pool.pids
        for pid in before:
            os.kill(pid, signal.SIGINT)
            assert os.getsid(pid) != os.getsid(0)
        assert [verdict.outcome for verdict in judge(pool, *["1"] * 6)] == ["pass"] * 6
        assert pool.pids == before


def test_a_worker_that_died_between_calls_costs_no_sample(source):
    with VerifierPool(source, workers=2) as pool:
        victim = pool.pids[0]
        os.kill(victim, signal.SIGKILL)
        assert gone([victim])
        assert [verdict.outcome for verdict in judge(pool, *["1"] * 6)] == ["pass"] * 6
        assert victim not in pool.pids and len(pool.pids) == 2


def test_an_interrupted_call_closes_the_pool(source, monkeypatch):
    pool = VerifierPool(source, workers=2)
    pids, step = pool.pids, pool._step
    monkeypatch.setattr(
        pool, "_step", lambda wait=None: step(wait) if wait == 0 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judge(pool, "hang", "hang")
    assert time.monotonic() - started < 4.0  # not the limit of 5 s
    assert not any(map(unreaped, pids))
    with pytest.raises(RuntimeError, match="closed"):
        judge(pool, "1")


def test_judging_goes_on_while_the_caller_does_other_things(source):
    responses = ["1", "echo a", "hang", "die", "0", "1"]
    with VerifierPool(source, workers=2, timeout=1.0) as pool:
        with pool.judging() as job:
            for response in responses:
                job.submit(response, {"answer": 1})
                time.sleep(0.05)
            deadline = time.monotonic() + 20.0
            while len(job.settled) < len(responses) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert len(job.settled) == len(responses)  # before the pool is waited for
            job.submit("0", {"answer": 1})
        assert job.verdicts == judge(pool, *responses, "0")
        with pool.judging() as job:
            pass
        assert job.verdicts == []


def test_an_error_while_judging_closes_the_pool(source):
    pool = VerifierPool(source, workers=2)
    pids, started = pool.pids, time.monotonic()
    with pytest.raises(KeyboardInterrupt), pool.judging() as job:
        job.submit("hang", {"answer": 1})
        raise KeyboardInterrupt
    assert time.monotonic() - started < 4.0  # not the limit of 5 s
    assert not any(map(unreaped, pids))
    with pytest.raises(RuntimeError, match="closed"), pool.judging():
        pass


def test_close_ends_every_process(source):
    pool = VerifierPool(source, workers=3)
    pids = pool.pids
    assert all(map(running, pids))
    pool.close()
    pool.close()
    assert not any(map(unreaped, pids))


def test_lengths_must_agree(source):
    with (
        VerifierPool(source, workers=1) as pool,
        pytest.raises(ValueError, match="2 responses but 1 examples"),
    ):
        pool.verify(["1", "1"], [{"answer": 1}])


SCRIPT = """
import sys, time
print("main runs", flush=True)
from lpo_jax.rewards import VerifierPool
pool = VerifierPool(sys.argv[1], workers=2)  # at the top level, without a guard on __name__
print(pool.verify(["1"], [{"answer": 1}])[0].outcome, *pool.pids, flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError("the user's script fails")
time.sleep(600)
"""


@pytest.mark.parametrize("end", ["raise", "kill"])
def test_no_process_outlives_the_main_one(source, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), source, end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as main:
        assert main.stdout.readline() == "main runs\n"
        outcome, *pids = main.stdout.readline().split()
        if end == "kill":
            assert all(map(running, map(int, pids)))
            main.kill()
        rest, _ = main.communicate(timeout=20)
    assert outcome == "pass" and len(pids) == 2
    assert rest == ""  # workers did not run the script again
    assert gone(map(int, pids))


BAD_FILES = {
    "syntax error": ("def verify(response, example:\n", "SyntaxError"),
    "import error": ("\n\nimport no_such_module_here\n", r"no_such_module_here'? \(line 3\)"),
    "other function": ("def verfy(response, example):\n    return 1.0\n", "did you mean 'verfy'"),
    "not a function": ("verify = 5\n", "no function 'verify'"),
    "exits": ("import sys\nsys.exit(4)\n", r"SystemExit: 4 \(line 2\)"),
    "dies": ("import os\nos._exit(7)\n", r"does not start: worker died \(exit 7\)"),
    "hangs": ("import time\ntime.sleep(600)\n", "does not start: wall-clock limit of 1 s"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_verifier_that_cannot_be_loaded_is_one_line_at_the_start(tmp_path, case):
    text, message = BAD_FILES[case]
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        VerifierPool(f"{file}:verify", workers=2, start_timeout=1.0 if case == "hangs" else 60.0)
    assert "\n" not in str(error.value) and "bad.py" in str(error.value)


def test_a_missing_file_and_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        VerifierPool(f"{tmp_path}/none.py:verify", workers=1)
    for bad in ({"workers": 0}, {"timeout": 0}, {"recycle_after": 0}):
        with pytest.raises(UserError, match="must be positive"):
            VerifierPool("countdown", **bad)
