"""Run untrusted programs in a sandbox.

`Sandbox` holds one program and runs it on one test after another, each time in a fresh process. There are two kinds:

bubblewrap: new namespaces for processes, network, IPC, host name and mounts (and for users, unless root starts it). The
  program has no network and sees no other process. Its file system is read-only and holds only `/usr` and the
  interpreter, except for 64 MB (10,000 files) of `/tmp` in memory. If root starts the sandbox, the program runs as a
  separate user that owns nothing.
weak: the machine as this user sees it, read-only. It is meant for machines that do not allow namespaces, and for
  programs that may be faulty but are not malicious: they can read this user's files and the verifier's memory.

In both kinds, a filter of system calls (`seccomp.py`) prevents the program from creating processes, signalling or
tracing other processes, opening sockets and, in the weak kind, changing any file. Both limit address space, processor
time, wall-clock time, threads, open files and output. When a test ends, the program's process is killed (in bubblewrap,
together with all others in its namespace) before the next test begins. The namespace ends when the verifier closes the
connection or dies.

Trust: the program shares its process with the code that calls it and returns its result, so it can find and forge
anything there, including the nonce that precedes a function's result. Everything that the sandbox returns is therefore
a claim about an output, never a verdict. Expected outputs never enter the sandbox; they are compared with the claim
outside, and forging a right claim requires solving the task. The nonce and the exit status only distinguish a result
from a program that stopped
early: exiting with status 0 is not a pass.
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
MAX_OUTPUT = 4 << 20  # bytes of output of one test
PATIENCE = 3.0  # wall-clock limit of a test, as a multiple of its processor time: the machine may be busy
GRACE = 1.0  # seconds of overhead that the sandbox itself may add to a test
_PARTING = 1.0  # seconds in which the runner must exit after the verifier closes the connection
_MAX_TASKS = 32  # threads of one program, including the runner
_STACK = 120 << 20  # bytes, for recursion through C; the kernel leaves a gap of 128 MB below the stack
_TEMPORARY = 64 << 20  # bytes in /tmp
_TEMPORARY_FILES = 10_000  # files in /tmp: an empty file takes more than 1 KB of the kernel's memory
_CHILD = os.path.abspath(sandbox_child.__file__)
_RUNNER = "/sandbox_child.py"  # its path inside bubblewrap
_FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")  # import only from the standard library
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # the whole environment; the order of a set must not decide a reward
_PACKAGES = "/packages"  # folder of the packages inside bubblewrap
# Used with packages: one thread per core would exceed the limits on address space and threads.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class SandboxFailed(Exception):
    """The sandbox did not start, or broke for a reason that the program cannot have caused."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a program on one test.

    Attributes:
      status: "ok" (exit status 0), "error", "timeout", or "lost" (the sandbox ended without a report, and so will all
        later tests).
      detail: the reason, in one line.
      output: what the program printed; for a function, its result as JSON, empty if it did not return.
    """

    status: str
    detail: str
    output: bytes = b""


class Sandbox:
    """One program in a sandbox. A context manager; leaving it ends every process in the sandbox.

    Args:
      kind: "bubblewrap" or "weak".
      program: Python source. It can use the standard library, parts of which are already imported, as online judges do.
      function: a function (or a method of the program's class `Solution`) to call; empty: the program reads stdin.
      memory_mb: limit on the address space, in MB.
      packages: installed packages that the program may import, together with their requirements. bubblewrap shows only
        these; in the weak sandbox, other packages in the same folders can also be imported.
      start_limit: seconds in which the sandbox must start.

    Raises:
      SandboxFailed: if the sandbox does not start.
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
        paths = installed_paths(*packages)
        folders = sorted({os.path.dirname(path) for path in paths}) if weak else [_PACKAGES]
        confined, child = ([], _CHILD) if weak else (_bubblewrap(*paths), _RUNNER)
        command = [*confined, _interpreter(), *_FLAGS, child]
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
        self._function, self._nonce, self._packages = function, job["nonce"].encode(), packages  # type: ignore[attr-defined]
        self._files = contextlib.ExitStack()
        self._errors = self._files.enter_context(os.fdopen(os.memfd_create("errors"), "w+b"))
        self._socket, theirs = map(self._files.enter_context, socket.socketpair())
        try:
            self._process = subprocess.Popen(  # type: ignore[call-overload]
                command,
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                cwd="/",
                env=_ENVIRONMENT | (_ONE_THREAD if packages else {}),
                start_new_session=True,  # this creates a process group, which the program cannot leave
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
            reason = detail or self._last_error() or f"it does not start within {start_limit:g} s"
            self.close()
            raise SandboxFailed(reason)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, given: str | tuple, *, seconds: float, wall_seconds: float | None = None) -> Report:
        """Run the program on one test.

        Args:
          given: the program's stdin; for a function, its arguments, of builtin types.
          seconds: limit on processor time, in seconds.
          wall_seconds: limit on wall-clock time, in seconds; by default `PATIENCE` times `seconds`.

        Raises:
          SandboxFailed: if the sandbox broke for a reason that the program cannot have caused.
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
            # If the runner ends without a report after the program has started, the program may be the cause. A program
            # that could get itself masked could avoid a bad reward, so this counts against it, unless the runner gives
            # a reason.
            if reason := self._last_error():
                raise SandboxFailed(reason) from None
            self.close()
            return Report("lost", "the sandbox ended before its report")
        if status == "broken":
            raise SandboxFailed(detail)
        if self._function:
            output = output.removeprefix(self._nonce) if output.startswith(self._nonce) else b""
        return Report(status, explain(detail, self._packages), output)

    def close(self) -> None:
        """End every process of the sandbox. Further calls do nothing."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()  # the runner then kills the program and exits
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PARTING)
        with contextlib.suppress(ProcessLookupError):  # the expected case: the group is empty
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._files.close()

    def _exchange(self, message: bytes, limit: float) -> tuple[str, str, bytes]:
        """Send a message and return the status, detail and output of the report on it.

        Raises:
          TimeoutError: if no report arrives within `limit` seconds.
          EOFError, OSError, ValueError: if the other side has ended, or its report is malformed.
        """
        deadline = time.monotonic() + limit
        self._socket.settimeout(limit)
        self._socket.sendall(sandbox_child.LENGTH.pack(len(message)) + message)
        (length,) = sandbox_child.LENGTH.unpack(self._receive(sandbox_child.LENGTH.size, deadline))
        if length > MAX_OUTPUT + 4096:
            raise ValueError("the report is too long")
        head, _, output = self._receive(length, deadline).partition(b"\n")
        nonce, status, detail = head.split(b" ", 2)
        if nonce != self._nonce:
            raise ValueError("the report has a wrong nonce")
        return status.decode(), detail.decode(errors="replace"), output

    def _receive(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            received = self._socket.recv(min(count - len(data), 1 << 20))
            if not received:
                raise EOFError
            data += received
        return bytes(data)

    def _last_error(self) -> str:
        """Return the last line that bubblewrap or the runner wrote to stderr; the program cannot write to it."""
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        lines = self._errors.read(10_000).decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def why_not(kind: str) -> str:
    """Run a program in a sandbox of this kind; return why it does not work here, or an empty text if it does."""
    # This also checks that the filter is active: a program that can fork prints nothing.
    program = "import os\ntry:\n    os.fork()\nexcept PermissionError:\n    print(input())\n"
    try:
        with Sandbox(kind, program) as sandbox:
            report = sandbox.run("ready", seconds=5.0)
    except SandboxFailed as error:
        return str(error)
    return "" if report == Report("ok", "", b"ready\n") else report.detail or "programs are not confined"


def check_packages(kind: str, packages: tuple[str, ...], memory_mb: int) -> None:
    """Check that packages can be imported in a sandbox of this kind.

    Raises:
      UserError: if a package cannot be imported there.
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
    """Choose the kind of sandbox, and check that it works.

    Args:
      kind: the preferred kind.
      allow_weak: whether "weak" may be used, also if "bubblewrap" does not work.

    Returns:
      The kind to use.

    Raises:
      UserError: if no permitted kind works here; the message gives the reason and what to do.
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
    """Return the path of the interpreter itself, outside any virtual environment."""
    return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]


def _own_user() -> int:
    """Return an unused user id: its processes are counted separately, and it owns no files."""
    return 2_000_000_000 + secrets.randbelow(1 << 24)


@functools.cache
def _bubblewrap(*packages: str) -> list[str]:
    """Return the command that starts a program in new namespaces, without the program itself.

    Args:
      *packages: files and folders to mount in `_PACKAGES`.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxFailed("bwrap is not installed")
    command = [found, "--die-with-parent", "--as-pid-1"]
    command += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
    if os.geteuid() == 0:
        # The runner first changes its user.
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    command += ["--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    # bubblewrap before 0.7 cannot limit the size of a tmpfs, so there is none: /tmp exists but is read-only.
    usage = subprocess.run([found, "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if "--size" in usage.stdout + usage.stderr:
        command += ["--perms", "1777", "--size", str(_TEMPORARY), "--tmpfs", "/tmp"]
    else:
        command += ["--dir", "/tmp"]
    # The interpreter is mounted after /tmp and /dev, which would hide an interpreter below /tmp or /dev/shm.
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
    """Return the options that create the parent folders of a path readable for all, not only for their owner."""
    parents: list[str] = []
    while (path := os.path.dirname(path)) != "/":
        parents = ["--perms", "0755", "--dir", path, *parents]
    return parents
