"""Running programs that nobody has read.

`Sandbox` holds one program and runs it on one test after another, each time as a fresh process. Two kinds:

bubblewrap: new namespaces for processes, network, IPC, host name, mounts (and users, unless root starts it): no
  network, no other process in sight, a read-only file system that holds `/usr` and the interpreter and nothing
  else, and 64 MB (10,000 files) of `/tmp` in memory. Started by root, the program is a user of its own that owns
  nothing.
weak: the machine as this user sees it, read-only. It is for machines that allow no namespaces, for programs that
  are trusted to be no worse than clumsy: they can read this user's files, the verifier's memory among them.

Both take the means from the program to become more than one process, to signal or trace another, to open a socket,
and (weak) to change any file, by a filter of system calls (`seccomp.py`); both bound its address space, processor
time, time on the clock, threads, open files, and output. A program ends with its test: its process is killed, in
bubblewrap with all others of its namespace, before the next test begins; the namespace ends when the verifier hangs
up or dies.

What a result is worth: the program shares its process with the few lines that call it and hand out what it
returns, so it can find and forge whatever is there, the nonce that leads a function's result included. All that
comes back is therefore a claim about an output, never a verdict. Expected outputs never enter the sandbox; they are
compared with the claim outside, and to forge a right one takes what the task asked for. The nonce and the exit status
only tell a result from a program that stopped on the way: leaving with exit 0 is not a pass.
"""

import contextlib
import dataclasses
import functools
import marshal
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time

from lpo_jax.errors import UserError
from lpo_jax.rewards import sandbox_child
from lpo_jax.rewards.packages import explain, installed_paths
from lpo_jax.rewards.seccomp import filter_program

KINDS = ("bubblewrap", "weak")
MAX_OUTPUT = 4 << 20  # bytes of one test
PATIENCE = 3.0  # a test may take this many times its processor time on the clock: the machine may be busy
GRACE = 1.0  # seconds that the sandbox itself may take over a test
_PARTING = 1.0  # seconds in which the runner has to leave when the verifier hangs up
_MAX_TASKS = 32  # threads of one program, with the runner
_STACK = 120 << 20  # bytes, for recursion through C; the kernel leaves 128 MB of room below the stack
_TEMPORARY = 64 << 20  # bytes of /tmp
_TEMPORARY_FILES = (
    10_000  # in /tmp: an empty one takes no byte of it, but more than 1 KB of the kernel's memory
)
_CHILD = os.path.abspath(sandbox_child.__file__)
_RUNNER = "/sandbox_child.py"  # where bubblewrap shows it, wherever it is installed
_FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")  # no path but the standard library's
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # all of it; a set's order must not decide a reward
_PACKAGES = "/packages"  # where bubblewrap shows packages
# With packages: a thread per core would take more address space, and more threads, than a program has.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class SandboxFailed(Exception):
    """The sandbox did not come up, or broke, before the program could have had a hand in it."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a program did on one test.

    Attributes:
      status: `ok` (ended with exit 0), `error`, `timeout`, or `lost` (the sandbox ended without a word; so do all
        tests after that).
      detail: why, in one line.
      output: what it printed; of a function, its result as JSON, empty if it returned none.
    """

    status: str
    detail: str
    output: bytes = b""


class Sandbox:
    """One program in a sandbox. A context manager; leaving it ends every process in it.

    Args:
      kind: `bubblewrap` or `weak`.
      program: Python source. It sees the standard library, and what judges usually import for it.
      function: a function (or a method of its class `Solution`) to call; empty: the program reads stdin.
      memory_mb: most address space.
      packages: installed packages that it may import, with what they require. bubblewrap shows these alone; in the
        weak sandbox, their neighbours can be imported too.
      start_limit: seconds for the sandbox to come up.

    Raises:
      SandboxFailed: it did not.
    """

    def __init__(
        self,
        kind: str,
        program: str,
        function: str = "",
        *,
        memory_mb: int = 1024,
        packages: tuple[str, ...] = (),
        start_limit: float = 10.0,
    ):
        weak = kind == "weak"
        folders = (
            sorted({os.path.dirname(path) for path in installed_paths(*packages)}) if weak else [_PACKAGES]
        )
        command = [
            *([] if weak else _bubblewrap(*installed_paths(*packages))),
            _interpreter(),
            *_FLAGS,
            _CHILD if weak else _RUNNER,
        ]
        job = {
            "program": program,
            "function": function,
            "nonce": secrets.token_hex(16),
            "user": _own_user() if os.geteuid() == 0 and not weak else 0,
            "filter": filter_program(read_only=weak),
            "limits": {"AS": memory_mb << 20, "NPROC": _MAX_TASKS, "FSIZE": MAX_OUTPUT, "STACK": _STACK},
            "packages": packages,
            "package_folders": folders if packages else [],
            "temporary_files": 0 if weak else _TEMPORARY_FILES,
            "count_processes": weak,
        }
        self._function, self._nonce, self._packages = function, job["nonce"].encode(), packages
        self._files = contextlib.ExitStack()
        self._errors = self._files.enter_context(os.fdopen(os.memfd_create("errors"), "w+b"))
        self._line, theirs = map(self._files.enter_context, socket.socketpair())
        try:
            self._process = subprocess.Popen(
                command,
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                cwd="/",
                env=_ENVIRONMENT | (_ONE_THREAD if packages else {}),
                start_new_session=True,  # and so a process group, which the program has no way to leave
            )
        except OSError as error:
            self._files.close()
            raise SandboxFailed(f"{error.filename}: {error.strerror}") from None
        theirs.close()
        try:
            status, detail, _ = self._exchange(marshal.dumps(job), start_limit)
        except (OSError, EOFError, ValueError):
            status, detail = "broken", ""
        if status != "ready":
            reason = detail or self._said() or f"it does not start within {start_limit:g} s"
            self.close()
            raise SandboxFailed(reason)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, given: str | tuple, *, seconds: float, wall_seconds: float | None = None) -> Report:
        """Runs the program once.

        Args:
          given: its stdin; for a function, its arguments, of builtin types.
          seconds: of processor time that it may take.
          wall_seconds: time on the clock; by default `PATIENCE` times as much.

        Raises:
          SandboxFailed: the sandbox broke through no doing of the program.
        """
        wall = PATIENCE * seconds if wall_seconds is None else wall_seconds
        stdin, arguments = ("", given) if self._function else (given, ())
        test = {"stdin": stdin, "arguments": arguments, "seconds": seconds, "wall_seconds": wall}
        message = marshal.dumps(test)
        try:
            status, detail, output = self._exchange(message, wall + GRACE)
        except TimeoutError:
            self.close()
            return Report("timeout", "on the clock")
        except (OSError, EOFError, ValueError):
            # What ends the runner without a word after the program began may be the program's work. A way to be
            # masked is a way around a bad reward, so it counts against the program, unless the runner says why.
            if said := self._said():
                raise SandboxFailed(said) from None
            self.close()
            return Report("lost", "the sandbox ended before its report")
        if status == "broken":
            raise SandboxFailed(detail)
        if self._function:
            output = output.removeprefix(self._nonce) if output.startswith(self._nonce) else b""
        return Report(status, explain(detail, self._packages), output)

    def close(self) -> None:
        """Ends every process of the sandbox. Calling it again does nothing."""
        if self._line.fileno() < 0:
            return
        self._line.close()  # at which the runner kills the program and leaves
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PARTING)
        with contextlib.suppress(ProcessLookupError):  # as it should be: nobody is left in the group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._files.close()

    def _exchange(self, message: bytes, limit: float) -> tuple[str, str, bytes]:
        """Sends a message; returns the status, detail and output of the report on it.

        Raises:
          TimeoutError: none came within so many seconds.
          EOFError, OSError, ValueError: the other side is gone, or says nonsense.
        """
        deadline = time.monotonic() + limit
        self._line.settimeout(limit)
        self._line.sendall(sandbox_child.LENGTH.pack(len(message)) + message)
        (length,) = sandbox_child.LENGTH.unpack(self._receive(sandbox_child.LENGTH.size, deadline))
        if length > MAX_OUTPUT + 4096:
            raise ValueError("a report too long")
        head, _, output = self._receive(length, deadline).partition(b"\n")
        nonce, status, detail = head.split(b" ", 2)
        if nonce != self._nonce:
            raise ValueError("a report of somebody else's")
        return status.decode(), detail.decode(errors="replace"), output

    def _receive(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._line.settimeout(max(deadline - time.monotonic(), 1e-3))
            piece = self._line.recv(min(count - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _said(self) -> str:
        """The last line of what bubblewrap or the runner have written to stderr, which the program has not."""
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        lines = self._errors.read(10_000).decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def why_not(kind: str) -> str:
    """Why programs cannot be run in this kind of sandbox here; empty when one just was."""
    # On the way it sees that the filter is in force: a program that could fork would print twice.
    program = "import os\ntry:\n    os.fork()\nexcept PermissionError:\n    print(input())\n"
    try:
        with Sandbox(kind, program) as sandbox:
            report = sandbox.run("ready", seconds=5.0)
    except SandboxFailed as error:
        return str(error)
    return "" if report == Report("ok", "", b"ready\n") else report.detail or "programs are not confined"


def check_packages(kind: str, packages: tuple[str, ...], memory_mb: int) -> None:
    """Imports packages in a sandbox of that kind.

    Raises:
      UserError: if one cannot be imported there.
    """
    for name in packages:
        try:
            with Sandbox(
                kind, f"import {name}\n", memory_mb=memory_mb, packages=packages, start_limit=60.0
            ) as sandbox:
                report = sandbox.run("", seconds=60.0)
        except SandboxFailed as error:
            report = Report("error", str(error))
        if report.status != "ok":
            raise UserError(f"code: package {name} cannot be imported by programs: {report.detail}")


def choose_kind(kind: str, *, allow_weak: bool) -> str:
    """The kind of sandbox to use, seen to work: the one asked for, or the weak one where that is allowed.

    Raises:
      UserError: if there is none, with the reason and the ways out.
    """
    if kind == "bubblewrap":
        reason = why_not(kind)
        if not reason:
            return kind
        if not allow_weak:
            raise UserError(
                f"code: programs cannot be confined here: {reason}; install bubblewrap on a machine that allows "
                "namespaces, or set rewards.allow_weak_sandbox to run programs that can read your files"
            )
    elif not allow_weak:
        raise UserError(
            "code: sandbox weak lets programs read your files; allow it with rewards.allow_weak_sandbox"
        )
    if reason := why_not("weak"):
        raise UserError(f"code: programs cannot be confined here, not even weakly: {reason}")
    return "weak"


def _interpreter() -> str:
    """The interpreter itself, whatever virtual environment it was started from."""
    return os.path.realpath(sys._base_executable)


def _own_user() -> int:
    """A user id that nobody has: its processes are counted by themselves, and it owns no file."""
    return 2_000_000_000 + secrets.randbelow(1 << 24)


@functools.cache
def _bubblewrap(*packages: str) -> list[str]:
    """The command that starts a program in new namespaces, up to the program.

    Args:
      *packages: files and folders to show in `_PACKAGES`.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxFailed("bwrap is not installed")
    command = [found, "--die-with-parent", "--as-pid-1"]
    command += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
    if os.geteuid() == 0:
        command += [
            "--cap-add",
            "CAP_SETUID",
            "--cap-add",
            "CAP_SETGID",
        ]  # the runner changes user first of all
    else:
        command += ["--unshare-user"]
    command += ["--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    # Versions before 0.7 cannot bound a tmpfs, so there is none: programs find /tmp, but cannot write to it.
    usage = subprocess.run([found, "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if "--size" in usage.stdout + usage.stderr:
        command += ["--perms", "1777", "--size", str(_TEMPORARY), "--tmpfs", "/tmp"]
    else:
        command += ["--dir", "/tmp"]
    # After these mounts, which would cover an interpreter below /tmp or /dev/shm.
    command += ["--dev", "/dev", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix = os.path.realpath(sys.base_prefix)
    if not f"{prefix}/".startswith("/usr/"):
        command += [*_open_parents(prefix), "--ro-bind", prefix, prefix]
    command += ["--ro-bind", _CHILD, _RUNNER, "--remount-ro", "/dev"]
    if packages:
        command += ["--perms", "0755", "--dir", _PACKAGES]
    for path in packages:
        command += ["--ro-bind", path, f"{_PACKAGES}/{os.path.basename(path)}"]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp"]


def _open_parents(path: str) -> list[str]:
    """Makes the folders above a path, for everybody: bubblewrap makes them for their owner alone."""
    parents = []
    while (path := os.path.dirname(path)) != "/":
        parents = ["--perms", "0755", "--dir", path, *parents]
    return parents
