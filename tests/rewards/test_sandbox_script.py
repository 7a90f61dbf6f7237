"""A program in the sandbox has the same environment and exit status as a script run by `python solution.py`."""

import concurrent.futures
import subprocess
import sys

import pytest

from lpo_jax.rewards import sandbox
from lpo_jax.rewards.sandbox import Sandbox

MISSING = {kind: sandbox.why_not(kind) for kind in sandbox.KINDS}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(reason), reason=f"no {kind} sandbox here: {reason}"))
    for kind, reason in MISSING.items()
]

# Each script prints something and ends in its own way; the text after `input` is its stdin.
SCRIPTS = {
    "exit": "print(1)\nexit()\nprint(2)",
    "quit": "print(1)\nquit()\nprint(2)",
    "exit with a status": "print(1)\nexit(3)",
    "exit in a function": "def f():\n    print(input())\n    exit(0)\nf()\nprint(2)",
    "exit with a message": "print(1)\nsys.exit('no answer')",
    "exit of every kind": "for code in (None, 0, True, 256, -1, 'x', (1, 2), 2.5):\n"
    "    try:\n        exit(code)\n    except SystemExit as error:\n        print(error.code)",
    "SystemExit": "print(1)\nraise SystemExit(4)",
    "os._exit": "print(1, flush=True)\nos._exit(5)",
    "an exception": "print(1)\n1 / 0",
    "an exception in a thread": "t = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()\nprint(1)",
    "exit in a thread": "t = threading.Thread(target=exit)\nt.start()\nt.join()\nprint(1)",
    "exit handlers": "atexit.register(print, 'left')\natexit.register(lambda: 1 / 0)\nexit(2)",
    "an exit handler that exits": "atexit.register(sys.exit, 3)\nprint(1)",
    "a thread that goes on": "end = threading.Event()\n"
    "threading.Thread(target=lambda: (end.wait(), time.sleep(0.05), print(2))).start()\nprint(1)\nend.set()",
    "names of a script": "print(__name__, os.path.basename(__file__), os.path.isabs(__file__), __doc__, __spec__)\n"
    "print(__package__, __cached__, type(__builtins__).__name__, __builtins__.len('ab'), sys.argv)\n"
    "import __main__\nprint(__main__.os is os, sys.modules['__main__'].__file__ == __file__)",
    "a docstring": "'''what it does'''\nprint(__doc__)",
    "annotations": "x: int = 1\nprint(__annotations__)",
    "help and notices": "print(exit, quit, callable(help), type(copyright).__name__, type(license).__name__)",
    "its own source": "import inspect\ndef f():\n    return 1\nprint(inspect.getsource(f))\n"
    "print(inspect.getsourcefile(f) == __file__)",
    "doctest": "def f():\n    '''\n    >>> f()\n    1\n    '''\n    return 1\nimport doctest\nprint(doctest.testmod())",
    "pickle": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__module__)",
    "closed stdout": "print(1)\nsys.stdout.close()",
    "closed stderr": "sys.stderr.close()\nprint(1)",
    "no stdout": "sys.stdout.flush()\nsys.stdout = None\nprint(1)",
    "deleted stdout": "print(1)\ndel sys.stdout",
    "detached stdout": "print(1)\nsys.stdout.flush()\nsys.stdout.detach()",
    "redirected": "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as text:\n    print(1)\n"
    "print(repr(text.getvalue()))",
    "stdout of its own": "class Fast:\n    parts = []\n    write = parts.append\n"
    "    def flush(self):\n        os.write(1, ''.join(self.parts).encode())\n        self.parts.clear()\n"
    "sys.stdout = Fast()\nprint(1)",
    "stdout without flush": "class Bad:\n    write = sys.__stdout__.write\nsys.stdout = Bad()\nprint(1)",
    "stdin of its own": "import io\nsys.stdin = io.StringIO('a\\nb\\n')\nprint(input(), sys.stdin.read())",
    "stdin read by bytes": "print(sys.stdin.buffer.readline(), open(0, closefd=False).read())",
    "the end of stdin": "input()\ninput()\ninput()",
    "an object that prints at its end": "class A:\n    def __del__(self):\n        print('end')\na = A()\nprint(1)",
    "a file left open": "f = open(1, 'w', closefd=False)\nf.write('x')",
    "recursion": "sys.setrecursionlimit(10**5)\nf = lambda n: n and 1 + f(n - 1)\nprint(f(20000))",
    "names of typing": "from typing import *\nprint(List[int], Optional[str])",
}
PRELUDE = "import atexit, os, sys, threading, time\n"


@pytest.fixture(scope="module")
def as_scripts(tmp_path_factory):
    """(status, stdout, last line of stderr) of every script, run by the interpreter itself."""
    folder, running = tmp_path_factory.mktemp("scripts"), {}
    for name, program in SCRIPTS.items():
        (folder / name).mkdir()
        (folder / name / "solution.py").write_text(_whole(program))
        command = [sandbox._interpreter(), "-X", "utf8", "solution.py"]
        running[name] = subprocess.Popen(
            command,
            cwd=folder / name,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PYTHONHASHSEED": "0"},
        )
    results = {}
    for name, process in running.items():
        output, errors = process.communicate(b"first\nsecond", timeout=60)
        lines = [line.strip() for line in errors.decode().split("\n") if line.strip()]
        results[name] = process.returncode, output, lines[-1] if lines else f"exit {process.returncode}"
    return results


def _whole(program):
    return program if program.startswith("'''") else PRELUDE + program


@pytest.mark.parametrize("kind", KINDS)
def test_programs_run_as_scripts_do(kind, as_scripts):
    def run(name):
        with Sandbox(kind, _whole(SCRIPTS[name])) as running:
            return running.run("first\nsecond", seconds=10)

    # The runner is the same in both kinds; the weak one runs all scripts only if bubblewrap is not available.
    names = (
        [*SCRIPTS]
        if kind == "bubblewrap" or MISSING["bubblewrap"]
        else ["exit", "names of a script", "doctest"]
    )
    different = {}
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for name, report in zip(names, threads.map(run, names)):
            code, output, last = as_scripts[name]
            expected = ("error", last) if code else ("ok", "")
            if (report.status, report.detail, report.output) != (*expected, output):
                different[name] = report, as_scripts[name]
    assert different == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_may_use_them_too(kind):
    program = (
        "def f(a):\n    if a == 1:\n        exit()\n    return [__name__, __file__.endswith('solution.py')]"
    )
    with Sandbox(kind, program, "f") as running:
        assert running.run((2,), seconds=5).output == b'["solution", true]'
        assert running.run((1,), seconds=5).output == b""


def test_a_script_finds_its_own_file_and_its_neighbours():
    if MISSING["bubblewrap"]:
        pytest.skip(MISSING["bubblewrap"])
    program = (
        "open('helper.py', 'w').write('x = 5')\nimport helper\nprint(helper.x)\nprint(open(__file__).read())"
    )
    with Sandbox("bubblewrap", program) as running:
        assert running.run("", seconds=5).output.decode() == f"5\n{program}\n"
    assert sys.path[0] != "/tmp"
