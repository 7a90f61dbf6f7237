"""The runner, which is the part inside the sandbox: it runs an untrusted program in a fresh process for each test.

It is started by file name, in an interpreter that can import only the standard library (and packages made available to
programs, which it imports for them), so it imports nothing from lpo_jax.

File descriptor 0 is the socket to the verifier. The runner reads one job (program, limits, filter) from it, and then
one test after another. For each test it forks. The child process applies the limits and returns from `serve_verifier`
to become the program; the runner waits for it, kills it, and reports what it printed or returned. The runner itself
never runs, parses or prints any part of the program.

Messages to the runner are marshalled, because they come from the verifier. Its reports are a line of text and raw
bytes, because data that the program can influence must not be unmarshalled.
"""

import atexit
import contextlib
import ctypes
import json
import linecache
import marshal
import os
import resource
import select
import site
import struct
import sys
import time
import types

LENGTH = struct.Struct("!Q")
SOCKET = 3  # file descriptor of the socket to the verifier, once the runner has started
# File descriptor for a function's result in the process that computes it, where the socket is closed.
RESULT = 3
STDERR_TAIL = 2000  # bytes of stderr that are searched for the last line

_LIBC = ctypes.CDLL(None, use_errno=True)
# prctl(2)
_PDEATHSIG, _NO_NEW_PRIVS, _SECCOMP, _FILTER = 1, 38, 22, 2
_SIGKILL = 9
# Seconds between checks of the number of files; a program can create thousands in that time.
_CHECK_INTERVAL = 0.01

# Modules that programs written for online judges use without importing them. The modules and their public names are
# predefined, except for names of builtins (math.pow would hide pow).
_STARRED = (
    *("typing", "collections", "heapq", "bisect", "math"),
    *("itertools", "functools", "operator", "string"),
)
# These modules are predefined if the program contains their name followed by a dot.
_NAMED = ("copy", "datetime", "io", "json", "os", "random", "re", "statistics", "time")


def serve_verifier() -> dict:
    """Serve the verifier. Returns (the job) only in the process of a test, never in the runner."""
    job = marshal.loads(_receive(0))
    os.dup2(0, SOCKET)
    if user := job["user"]:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if job["count_processes"]:
        job["limits"]["NPROC"] += _own_tasks()
    for add in (site.setquit, site.setcopyright, site.sethelper):
        add()  # exit, quit, license, help ..., which `site` adds; the runner's interpreter starts without `site`
    sys.path += job["package_folders"]
    for package in job["packages"]:
        if package in job["program"]:  # imported once here, so that it does not count against each test
            with contextlib.suppress(Exception):  # the program's own import will report the error
                __import__(package)
    job["names"] = _names(job["program"])
    job["file"] = _write_script(job)
    _report(job, "ready", "")
    while True:
        test = marshal.loads(_receive(SOCKET))
        try:
            if _run(job, test):
                return job
        except OSError as error:  # fork failed, no memory for a file: not caused by the program
            _report(job, "broken", f"{type(error).__name__}: {error}")
            os._exit(1)


def _run(job: dict, test: dict) -> bool:
    """Run one test and report it. Returns True only in the child process, which becomes the program."""
    given, output, errors = (os.memfd_create(name) for name in ("given", "output", "errors"))
    _write(given, test["stdin"].encode(errors="replace"))
    os.lseek(given, 0, os.SEEK_SET)
    child = os.fork()
    if child == 0:
        _become(job, test, given, output, errors)
        return True
    status, detail = _wait(child, job, test)
    _kill_all(child)
    _, code, usage = os.wait4(child, 0)
    _reap()
    code = os.waitstatus_to_exitcode(code)
    if not status and usage.ru_utime + usage.ru_stime > test["seconds"]:
        status, detail = "timeout", "of processor time"
    elif not status and code == 0:
        status, detail = "ok", ""
    elif not status:
        status, detail = "error", _last_line(errors) or (f"signal {-code}" if code < 0 else f"exit {code}")
    _report(job, status, detail, os.pread(output, job["limits"]["FSIZE"], 0))
    for file in (given, output, errors):
        os.close(file)
    return False


def _wait(child: int, job: dict, test: dict) -> tuple[str, str]:
    """Wait for a process to end or to exceed a limit. Exits if the verifier closes the connection.

    Returns:
      The status and its detail if a limit was exceeded, else two empty texts.
    """
    clock = (~child << 3) | 2  # clock_getcpuclockid(3)
    deadline = time.monotonic() + test["wall_seconds"]
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(SOCKET, select.POLLIN)  # no message is expected: any event means that it is closed
    files = job["temporary_files"]
    status, detail = "", ""
    while not status:
        left, wall_left = test["seconds"] - time.clock_gettime(clock), deadline - time.monotonic()
        pause = max(0, min(left, wall_left, _CHECK_INTERVAL if files else left))
        if left <= 0 or wall_left <= 0:
            status, detail = "timeout", "of processor time" if left <= 0 else "on the clock"
        elif files and _temporary_files() > files:
            status, detail = "error", f"more than {files} files in /tmp"
        # Poll again when a limit is reached: if the runner itself was stopped, the process may have ended.
        happened = [file for file, _ in poll.poll(0 if status else int(1000 * pause) + 1)]
        if SOCKET in happened:
            _kill_all(child)
            os._exit(0)
        if ended in happened:
            status, detail = "", ""
            break
    os.close(ended)
    return status, detail


def _temporary_files() -> int:
    """Return the number of files, folders and links in the file system of /tmp, including open deleted files."""
    usage = os.statvfs("/tmp")
    return usage.f_files - usage.f_ffree


def _kill_all(child: int) -> None:
    os.kill(child, _SIGKILL)
    if os.getpid() == 1:  # in its own namespace: kill everything else in it
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, _SIGKILL)


def _reap() -> None:
    """Wait for the killed processes that the first process of the namespace has inherited."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _become(job: dict, test: dict, given: int, output: int, errors: int) -> None:
    """Give this process the files, limits and filter of the program. This cannot be undone."""
    nowhere = os.open("/dev/null", os.O_RDWR)
    os.dup2(given, 0)
    os.dup2(nowhere if job["function"] else output, 1)
    os.dup2(errors, 2)
    if job["function"]:
        os.dup2(output, RESULT)
    os.closerange(RESULT + bool(job["function"]), 64)
    job["arguments"] = test["arguments"]
    limits = job["limits"] | {"CPU": int(test["seconds"]) + 1, "CORE": 0, "NOFILE": 64}
    for name, value in limits.items():
        _limit(getattr(resource, f"RLIMIT_{name}"), value)
    sys.setrecursionlimit(600_000)  # as in PRIME
    sys.set_int_max_str_digits(0)
    _prctl(_PDEATHSIG, _SIGKILL)
    _prctl(_NO_NEW_PRIVS, 1)
    _LIBC.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24))  # drops all capabilities, also of root
    code = ctypes.create_string_buffer(job["filter"])
    sock_fprog = struct.pack("@HP", len(job["filter"]) // 8, ctypes.addressof(code))
    program = ctypes.create_string_buffer(sock_fprog)
    _prctl(_SECCOMP, _FILTER, ctypes.addressof(program))


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0)[:4]]
    if _LIBC.prctl(option, *padded):
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, hard if which == resource.RLIMIT_STACK else value))


def _own_tasks() -> int:
    """Return the number of this user's threads on the whole machine, which RLIMIT_NPROC counts."""
    count = 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):  # the process has ended
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count


def _names(program: str) -> dict:
    """Return the names that are predefined for a program."""
    builtins = vars(__import__("builtins"))
    modules = {name: __import__(name) for name in _STARRED}
    names = {
        name: value
        for module in modules.values()
        for name, value in vars(module).items()
        if name in getattr(module, "__all__", vars(module)) and name[0] != "_" and name not in builtins
    }
    named = {name: __import__(name) for name in _NAMED if f"{name}." in program}
    return names | modules | named | {"sys": sys}


def _write_script(job: dict) -> str:
    """Write the program to a file if it may write files itself; return the path of that file in any case."""
    path = os.path.abspath("solution.py")
    if job["temporary_files"]:
        with contextlib.suppress(OSError), open(path, "wb") as file:  # /tmp is not writable everywhere
            file.write(job["program"].encode(errors="replace"))
    lines = job["program"].splitlines(keepends=True)
    linecache.cache[path] = (len(job["program"]), None, lines, path)  # used by `inspect`
    return path


def run_program(job: dict) -> None:
    """Run the program in this process and end the process as the interpreter would, but without its finalisation."""
    name = "solution" if job["function"] else "__main__"
    module = sys.modules[name] = types.ModuleType(name)
    code = 1
    try:
        try:
            _execute(job, module)
        finally:
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()  # waits for the program's threads
            atexit._run_exitfuncs()
        code = 0
    except SystemExit as error:
        code = _exit_status(error.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    flushed = _flush("stdout", "__stdout__", "stderr")
    vars(module).clear()  # flushes files that are still open, and finalises objects, which may print
    if not (_flush("__stdout__", "__stderr__") and flushed):
        code = code or 120  # as the interpreter does
    os._exit(code & 0xFF)


def _exit_status(code: object) -> int:
    """Return the exit status for `sys.exit(code)`."""
    if code is None or isinstance(code, int):
        return int(code or 0)
    with contextlib.suppress(Exception):
        print(code, file=sys.stderr)
    return 1


def _flush(*names: str) -> bool:
    """Flush the standard streams, which the program may have replaced; return whether all succeeded."""
    failed = False
    for file in (getattr(sys, name, None) for name in names):
        try:
            if file is not None and not getattr(file, "closed", False):
                file.flush()
        except Exception as error:
            failed = True
            with contextlib.suppress(Exception):
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
    return not failed


def _execute(job: dict, module: types.ModuleType) -> None:
    script = {"__file__": job["file"], "__cached__": None, "__builtins__": sys.modules["builtins"]}
    vars(module).update(job["names"] | script)
    sys.argv = ["solution.py"]
    if os.path.exists(job["file"]):
        sys.path.insert(0, os.path.dirname(job["file"]))
    exec(compile(job["program"], job["file"], "exec", dont_inherit=True), vars(module))
    if job["function"]:
        owner = getattr(module, "Solution", None)
        owner = owner() if hasattr(owner, job["function"]) else module
        value = encode_result(getattr(owner, job["function"])(*job["arguments"]))
        _write(RESULT, f"{job['nonce']}{json.dumps(value)}".encode())


def encode_result(value: object) -> object:
    """Encode a value of builtin types for JSON.

    Lists and tuples become arrays. Other containers, complex numbers, bytes and large integers become objects with one
    key.

    Raises:
      TypeError: if the value contains any other type.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() < 1000 else {"int": hex(value)}  # decimal is quadratic
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list | tuple):
        return [encode_result(item) for item in value]
    if isinstance(value, set | frozenset):
        return {"set": [encode_result(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode_result(key), encode_result(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    raise TypeError(f"returned a {type(value).__name__}, which is no value of a builtin type")


def _last_line(file: int) -> str:
    start = max(0, os.fstat(file).st_size - STDERR_TAIL)
    lines = os.pread(file, STDERR_TAIL, start).decode(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def _report(job: dict, status: str, detail: str, output: bytes = b"") -> None:
    report = f"{job['nonce']} {status} {detail}\n".encode() + output
    _write(SOCKET, LENGTH.pack(len(report)) + report)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _receive(file: int) -> bytes:
    (length,) = LENGTH.unpack(_exactly(file, LENGTH.size))
    return _exactly(file, length)


def _exactly(file: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        received = os.read(file, count - len(data))
        if not received:
            os._exit(0)  # the verifier has closed the connection
        data += received
    return bytes(data)


if __name__ == "__main__":
    run_program(serve_verifier())
