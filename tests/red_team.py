"""Programs that try to earn an undeserved reward, to hang or break the machine, or to escape. None may earn a reward.

`attack` runs a program in a sandbox and checks what it left behind. It is used by tests/rewards/test_sandbox.py and
scripts/check_code_sandbox.py. The programs use exploits that work against other verifiers (frame walking, `__eq__`,
exit before the asserts, raising if nothing is expected), and common ways to escape from containers.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import os
import secrets
import socket
import tempfile
import termios
import threading
from pathlib import Path

from lpo_jax.rewards import Verdict, Verifier, get

HOME = str(Path(__file__).parents[1])  # the repository

# Prepended to every attack: where to find things on the host, and the mark that its processes carry.
PRELUDE = """
import ctypes, ctypes.util, fcntl, gc, os, signal, socket, struct, sys, termios, threading, time
MARK, SECRET_FILE, HOME, PORT = {mark!r}, {secret_file!r}, {home!r}, {port!r}
SOCKET_FILE, SHARED_MEMORY, TERMINAL = {socket_file!r}, {shared_memory!r}, {terminal!r}
libc = ctypes.CDLL(None)
libc.prctl(15, MARK.encode())  # PR_SET_NAME, which forks inherit

def attempt(function, *arguments):
    try:
        return function(*arguments)
    except BaseException:
        return None

def show(text):  # prints anything that looks like an expected output
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    for at in range(len(text)):
        at = text.find("answer-", at)
        if at < 0:
            break
        print(text[at : at + 39])
        sys.stdout.flush()
        os._exit(0)
"""

LINGER = """
def linger():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    attempt(os.setsid)
    os.execv("/usr/bin/sleep", [MARK, "600"]) if os.path.exists("/usr/bin/sleep") else time.sleep(600)
"""


@dataclasses.dataclass(frozen=True)
class Exploit:
    """A program and the test that it must not pass.

    Attributes:
      program: the code that runs after `PRELUDE`.
      expected: the output to print, or the value that `f` should return; None for a secret that begins with `answer-`.
      function: whether `f` is called, with the arguments 1 and 2.
      weak: whether the weak sandbox also withstands the program.
    """

    program: str
    expected: str | None = None
    function: bool = False
    weak: bool = True


EXPLOITS = {
    # Undeserved rewards.
    "a list equal to everything": Exploit(
        "class L(list):\n    __eq__ = lambda s, o: True\n    __hash__ = None\n    __len__ = lambda s: 2\n"
        "f = lambda a, b: L()",
        "[1, 2]",
        function=True,
    ),
    "text and numbers equal to everything": Exploit(
        "class S(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\nf = lambda a, b: S('x')",
        "'y'",
        function=True,
    ),
    "walk the frames and the heap": Exploit(
        "frame = sys._getframe()\n"
        "while frame:\n    show(repr(frame.f_locals) + repr(frame.f_globals))\n    frame = frame.f_back\n"
        "for thing in gc.get_objects():\n    show(attempt(repr, thing) or '')"
    ),
    "sys.exit(0)": Exploit("sys.exit(0)"),
    "os._exit(0)": Exploit("os._exit(0)"),
    "os._exit(0) from the function": Exploit("f = lambda a, b: os._exit(0)", "3", function=True),
    "become /usr/bin/true": Exploit("os.execv('/usr/bin/true', ['true'])"),
    "raise where nothing is expected": Exploit("def f(a, b):\n    raise ValueError", "''", function=True),
    "raise before printing nothing": Exploit("raise ValueError", "\nx"),
    "forge a result with the nonce": Exploit(
        "frame = sys._getframe()\nwhile 'job' not in frame.f_locals:\n    frame = frame.f_back\n"
        "nonce = frame.f_locals['job']['nonce']\nos.write(3, nonce.encode() + b'true')\nos._exit(0)",
        "5",
        function=True,
    ),
    "patch what hands out the result": Exploit(
        "import json, builtins\njson.dumps = lambda value: '{}'\nbuiltins.isinstance = lambda a, b: True\n"
        "f = lambda a, b: object()",
        "3",
        function=True,
    ),
    "a result too deep to read": Exploit(
        "import json\njson.dumps = lambda value: '[' * 2_000_000\nf = lambda a, b: 0", "[1]", function=True
    ),
    "a set made to collide": Exploit(
        "import json\nitems = [i * (2**61 - 1) for i in range(1, 150_000)]\n"
        "json.dumps = lambda value, dumps=json.dumps: dumps({'set': items})\nf = lambda a, b: 0",
        "{1, 2}",
        function=True,
    ),
    # Reading the expected outputs.
    "read the verifier's memory": Exploit(
        "for pid in attempt(os.listdir, '/proc') or ['1', 'self']:\n"
        "    for line in attempt(lambda: list(open(f'/proc/{pid}/maps'))) or []:\n"
        "        start, end = (int(x, 16) for x in line.split()[0].split('-'))\n"
        "        if 'rw' in line and end - start < 1 << 26:\n"
        "            memory = attempt(lambda: open(f'/proc/{pid}/mem', 'rb', 0))\n"
        "            memory and attempt(memory.seek, start)\n"
        "            memory and show(attempt(memory.read, end - start) or b'')",
        weak=False,
    ),
    "trace the parent": Exploit(
        "for pid in (1, 2, os.getppid()):\n"
        "    print(libc.ptrace(16, pid, 0, 0), libc.process_vm_readv(pid, 0, 0, 0, 0, 0))"
    ),
    "read the task's files": Exploit("show(open(SECRET_FILE).read())", weak=False),
    "read the repository": Exploit("print(os.listdir(HOME), open(HOME + '/README.md').read())", weak=False),
    # Exceeding limits.
    "fork bomb": Exploit("while True:\n    attempt(os.fork)\n    attempt(libc.fork)\n    libc.syscall(57)"),
    "thread bomb": Exploit(
        "threading.stack_size(32768)\nwhile True:\n    attempt(threading.Thread(target=time.sleep, args=(60,)).start)",
        weak=False,
    ),
    "10 GB at once": Exploit("x = bytearray(10 << 30)"),
    "10 GB bit by bit": Exploit("x = []\nwhile True:\n    x.append(bytearray(1 << 20))"),
    "memory beside the address space": Exploit(
        "for i in range(20):\n    print(libc.memfd_create(b'x', 0), libc.shmget(0, 1 << 30, 0o1600))"
    ),
    "endless output": Exploit("while True:\n    print('x' * 65536)"),
    "endless output, errors ignored": Exploit("while True:\n    attempt(os.write, 1, b'x' * 65536)"),
    "endless stderr": Exploit("while True:\n    attempt(os.write, 2, b'x' * 65536)"),
    "fill the disk": Exploit(
        "for i in range(1000):\n    attempt(lambda: open(f'/tmp/{MARK}{i}', 'wb').write(b'x' * (100 << 20)))"
    ),
    "a flood of empty files": Exploit(
        "n = 0\nwhile True:\n    attempt(os.mknod, f'/tmp/{MARK}{n}')\n    n += 1"
    ),
    "for ever, deaf to signals": Exploit(
        "for number in range(1, 65):\n    attempt(signal.signal, number, signal.SIG_IGN)\nwhile True: pass"
    ),
    "sleep for ever": Exploit("time.sleep(600)"),
    "hang while leaving": Exploit("import atexit\natexit.register(time.sleep, 600)"),
    "a thread that stays": Exploit("threading.Thread(target=time.sleep, args=(600,)).start()"),
    # Getting masked instead of scored.
    "crash the interpreter": Exploit("ctypes.string_at(0)"),
    "close every file": Exploit("os.closerange(0, 4096)"),
    "kill everything in reach": Exploit(
        "for pid in (os.getppid(), 1, 2, 0, -1):\n    attempt(os.kill, pid, 9)\n    libc.kill(pid, 9)\n"
        "attempt(os.killpg, 0, 9)"
    ),
    "signal by proxy": Exploit(
        "import fcntl\nr, w = os.pipe()\n"
        "for owner in (os.getppid(), 1):\n"
        "    attempt(fcntl.fcntl, r, fcntl.F_SETOWN, owner)\n    attempt(fcntl.fcntl, r, 10, 9)\n"
        "    attempt(fcntl.fcntl, r, fcntl.F_SETFL, os.O_ASYNC)\n    os.write(w, b'x')"
    ),
    "an answer that is no text": Exploit("os.write(1, bytes(range(256)) * 1000)"),
    "a program that is no text": Exploit("x = '\x00\ud800'"),
    # Escaping from the sandbox.
    "connect to the host": Exploit(
        "s = socket.socket()\ns.connect(('127.0.0.1', PORT))\ns.send(b'here')\nprint('connected')"
    ),
    "connect by system call": Exploit("print([libc.socket(family, 1, 0) for family in (1, 2, 10, 16)])"),
    "write outside of /tmp": Exploit(
        "for folder in (HOME, '/', '/usr', '/usr/bin', '/dev', '/dev/shm', '/etc', '/root', '/home', '/var/tmp',\n"
        "               os.path.dirname(SECRET_FILE), sys.prefix, os.path.dirname(os.__file__)):\n"
        "    attempt(lambda: open(folder + '/' + MARK, 'w').write('here'))\n"
        "    attempt(lambda: os.mkdir(folder + '/' + MARK + '.d'))\n"
        "attempt(os.unlink, SECRET_FILE)\nattempt(os.rename, SECRET_FILE, SECRET_FILE + MARK)\n"
        "attempt(lambda: open(SECRET_FILE, 'w'))"
    ),
    "send to a socket of the host": Exploit(
        "for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM):\n"
        "    for end in attempt(socket.socketpair, socket.AF_UNIX, kind) or ():\n"
        "        attempt(end.sendto, b'here', SOCKET_FILE)\n"
        "        attempt(end.sendmsg, [b'here'], [], 0, SOCKET_FILE)\n"
        "        attempt(end.connect, SOCKET_FILE)\n        attempt(end.send, b'here')"
    ),
    "leave a socket behind": Exploit(
        "for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM):\n"
        "    for end in attempt(socket.socketpair, socket.AF_UNIX, kind) or ():\n"
        "        attempt(end.bind, f'{os.path.dirname(SECRET_FILE)}/{MARK}-{kind}')"
    ),
    "remove shared memory": Exploit(
        "print(libc.shmctl(SHARED_MEMORY, 0, 0), libc.semctl(0, 0, 0), libc.msgctl(0, 0, 0), libc.mq_unlink(b'/x'))"
    ),
    "change a terminal": Exploit(
        "file = attempt(os.open, TERMINAL, os.O_RDONLY | os.O_NOCTTY)\n"
        "settings = attempt(termios.tcgetattr, file)\nsettings[3] ^= termios.ECHO\n"
        "for when in (termios.TCSANOW, termios.TCSADRAIN, termios.TCSAFLUSH):\n"
        "    attempt(termios.tcsetattr, file, when, settings)\n"
        "attempt(fcntl.ioctl, file, termios.TIOCSTI, b'x')\n"
        "attempt(fcntl.ioctl, file, termios.TIOCSWINSZ, struct.pack('4H', 7, 7, 7, 7))"
    ),
    "change attributes of a file": Exploit(
        "file = attempt(os.open, SECRET_FILE, os.O_RDONLY)\n"
        "flags = bytearray(8)\nattempt(fcntl.ioctl, file, 0x80086601, flags)\n"
        "attempt(fcntl.ioctl, file, 0x40086602, struct.pack('l', flags[0] | 0x40))\n"  # FS_IOC_SETFLAGS
        "attempt(os.setxattr, SECRET_FILE, 'user.' + MARK, b'here')\n"
        "value = ctypes.create_string_buffer(b'here')\n"
        "xattr = struct.pack('QII', ctypes.addressof(value), 4, 0)\n"
        "print(libc.syscall(463, -100, SECRET_FILE.encode(), 0, b'user.at' + MARK.encode(), xattr, 16))\n"  # setxattrat
        "print(libc.syscall(469, -100, SECRET_FILE.encode(), struct.pack('QIIII', 0x80, 0, 0, 0, 0), 24, 0))"
    ),
    "become root": Exploit(
        "attempt(os.setuid, 0)\nattempt(os.chroot, '/')\nprint(libc.mount(b'x', b'/tmp', b'tmpfs', 0, 0))"
    ),
    "new namespaces": Exploit("print(libc.unshare(0x10000000), libc.unshare(0x40000000))"),
    "outlive its timeout": Exploit(LINGER + "linger()"),
    "outlive it in a second process": Exploit(
        LINGER
        + "for fork in (os.fork, libc.fork, libc.vfork):\n    if attempt(fork) == 0:\n        linger()\nlinger()"
    ),
    "start a program": Exploit(
        "os.system(f'exec -a {MARK} sleep 600 &')\nimport subprocess\n"
        "subprocess.Popen([MARK, '600'], executable='/usr/bin/sleep')"
    ),
    "raise its own limits": Exploit(
        "import resource\nfor name in dir(resource):\n    if name.startswith('RLIMIT_'):\n"
        "        attempt(resource.setrlimit, getattr(resource, name), (-1, -1))\n"
        "        attempt(resource.prlimit, os.getppid(), getattr(resource, name), (0, 0))\n"
        "x = bytearray(10 << 30)"
    ),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of an attack: the verdict, and in `harm` its effects on the host, one line each."""

    verdict: Verdict
    harm: list[str]

    @property
    def withstood(self) -> bool:
        """Whether there is no reward and no harm, and the sample is not masked, which would avoid the reward of 0."""
        return self.verdict.reward == 0 and not self.verdict.masked and not self.harm


def attack(exploit: Exploit, kind: str, folder: Path, verify: Verifier | None = None) -> Result:
    """Run an exploit in a sandbox, with limits of about a second.

    Args:
      exploit: the program and its test.
      kind: the kind of sandbox.
      folder: an empty folder on the host, for a file that must not be read or changed.
      verify: another verifier to attack.
    """
    mark = "m" + secrets.token_hex(5)
    secret = "answer-" + secrets.token_hex(16)
    secret_file = folder / f"secret-{mark}"
    secret_file.write_text(secret)
    verify = verify or get("code", time_limit=0.4, total_limit=1.2, memory_mb=512, sandbox=kind)
    with _listener() as (port, visitors), _belongings(secret_file) as (belongings, changes):
        prelude = PRELUDE.format(mark=mark, secret_file=str(secret_file), home=HOME, port=port, **belongings)
        expected = secret if exploit.expected is None else exploit.expected
        tests = {"inputs": ["1\n2"], "outputs": [expected]}
        if exploit.function:
            tests["fn_name"] = "f"
            tests["outputs"] = [repr(secret)] if exploit.expected is None else [expected]
        verdict = verify(f"```python\n{prelude}\n{exploit.program}\n```", {"tests": tests})
        harm = changes()
    harm += [f"{count} connections to the host" for count in visitors]
    harm += [f"left process {name}" for name in marked_processes(mark)]
    if not secret_file.exists() or secret_file.read_text() != secret:
        harm.append("changed a file of the host")
    places = (
        HOME,
        "/",
        "/usr",
        "/usr/bin",
        "/dev",
        "/dev/shm",
        "/etc",
        "/root",
        "/home",
        "/tmp",
        "/var/tmp",
        folder,
    )
    for place in places:
        with contextlib.suppress(OSError):
            harm += [
                f"wrote {place}/{name}"
                for name in os.listdir(place)
                if mark in name and name != secret_file.name
            ]
    return Result(verdict, harm)


def marked_processes(mark: str) -> list[str]:
    """Return all processes of this machine that carry the mark in their name or command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            names = Path(f"/proc/{pid}/comm").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
            if mark.encode() in names:
                found.append(f"{pid}: {names.decode(errors='replace')}")
    return found


@contextlib.contextmanager
def _belongings(secret_file: Path):
    """Create objects of the host other than files; yield where they are, and a function that lists changes to them."""
    libc = ctypes.CDLL(None)
    shared_memory = libc.shmget(0, 4096, 0o1600)
    controller, terminal = os.openpty()
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener,
    ):
        socket_file = f"{folder}/s"  # the name of the test's own folder can be too long for a socket
        listener.bind(socket_file)
        listener.setblocking(False)
        os.chmod(folder, 0o755)
        os.chmod(socket_file, 0o777)

        def state() -> dict[str, object]:
            return {
                "the settings of a terminal": termios.tcgetattr(terminal),
                "the size of a terminal": fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8)),
                "shared memory": libc.shmctl(shared_memory, 2, ctypes.create_string_buffer(256)),  # IPC_STAT
                "attributes of a file": (os.listxattr(secret_file), _flags(secret_file)),
            }

        before = state()

        def changes() -> list[str]:
            after = state()
            harm = [f"changed {name}" for name in before if before[name] != after[name]]
            with contextlib.suppress(BlockingIOError):
                harm.append(f"sent {listener.recv(100)} to a socket of the host")
            return harm

        try:
            places = {"socket_file": socket_file, "shared_memory": shared_memory}
            yield places | {"terminal": os.ttyname(terminal)}, changes
        finally:
            libc.shmctl(shared_memory, 0, 0)  # IPC_RMID
            os.close(terminal)
            os.close(controller)


def _flags(file: Path) -> bytes:
    """Return the flags of a file, as shown by `lsattr`; empty if its file system has no flags."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return fcntl.ioctl(descriptor, 0x80086601, bytes(8))
    except OSError:
        return b""
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _listener():
    """Open a port of this machine; yield it, and a list of the connections to it."""
    visitors: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()
                    visitors.append(1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], visitors
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
