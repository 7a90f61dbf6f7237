"""The kernel filter (seccomp-BPF) for the system calls of an untrusted program.

A program under this filter remains one process (it may start threads). It cannot signal, trace or change another
process, use a socket except its own pairs, set attributes, locks or owners of files or terminals, or hold memory that
does not count against its own address space. Calls that are not listed are refused, including those that later kernels
add: these return ENOSYS, so that libc falls back to an older call, and all others return EPERM.

References:
  `man 2 seccomp`; the numbers are those of the kernel's `asm/unistd.h`.
"""

import errno
import platform
import struct
import sys

from lpo_jax.errors import UserError

_Numbers = dict[str, tuple[int | None, int | None]]


def _numbers(table: str) -> _Numbers:
    """Parse `name x86-64 arm64, ...`; a dash means that the architecture has no such call."""
    rows = [entry.split() for entry in table.split(",")]
    return {name: (int(x86), None if arm == "-" else int(arm)) for name, x86, arm in rows}


# Calls on open files, and calls that only read.
_FILES = _numbers("""
    read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, pread64 17 67,
    pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, dup 32 23, dup2 33 -,
    sendfile 40 71, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getdents 78 -, getdents64 217 61, getcwd 79
    17, chdir 80 49, fchdir 81 50, readlink 89 -, umask 95 166, statfs 137 43, fstatfs 138 44, getxattr 191 8,
    lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13, newfstatat 262
    79, readlinkat 267 78, faccessat 269 48, fallocate 285 47, eventfd 284 -, eventfd2 290 19, signalfd 282 -,
    signalfd4 289 74, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait
    281 22, pselect6 270 72, ppoll 271 73, dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70, preadv2 327
    286, pwritev2 328 287, copy_file_range 326 285, statx 332 291, close_range 436 436, faccessat2 439 439,
    epoll_pwait2 441 441
""")
# Calls on its own address space. Other kinds of memory (System V, memfd, AIO, io_uring) do not count against the limit.
_MEMORY = _numbers("""
    mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216, msync 26 227, mincore 27 232, madvise
    28 233, mbind 237 235, set_mempolicy 238 237, get_mempolicy 239 236, membarrier 324 283
""")
# Calls on its own signals, clocks, threads, limits and exit. `execve` keeps the filter and the process.
_SELF = _numbers("""
    rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128
    137, rt_sigsuspend 130 133, sigaltstack 131 132, restart_syscall 219 128, sched_yield 24 124, pause 34 -,
    nanosleep 35 101, clock_nanosleep 230 115, getitimer 36 102, setitimer 38 103, alarm 37 -, gettimeofday 96
    169, time 201 -, clock_gettime 228 113, clock_getres 229 114, times 100 153, getpid 39 172, gettid 186 178,
    getppid 110 173, getpgrp 111 -, getpgid 121 155, getsid 124 156, getuid 102 174, getgid 104 176, geteuid 107
    175, getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150, capget 125 90, getrlimit 97
    163, setrlimit 160 164, getrusage 98 165, getpriority 140 141, sched_getparam 143 121, sched_getscheduler
    145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126, sched_rr_get_interval 148 127,
    sched_getaffinity 204 123, sched_getattr 315 275, getcpu 309 168, uname 63 160, sysinfo 99 179, getrandom
    318 278, futex 202 98, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293, arch_prctl 158 -,
    execve 59 221, wait4 61 260, waitid 247 95, exit 60 93, exit_group 231 94
""")
# Calls on socket pairs, which asyncio needs; `_JUDGED` restricts how they are created.
_PAIRS = _numbers("""
    shutdown 48 210, getsockname 51 204, getpeername 52 205, getsockopt 55 209, recvfrom 45 207
""")
# Calls that change a file system, its locks or caches, except opening a file for writing.
_CHANGING = _numbers("""
    truncate 76 45, rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -, link 86 -, unlink 87 -, symlink 88 -, chmod
    90 -, fchmod 91 52, chown 92 -, fchown 93 55, lchown 94 -, utime 132 -, utimes 235 -, futimesat 261 -, mknod
    133 -, mkdirat 258 34, mknodat 259 33, fchownat 260 54, unlinkat 263 35, renameat 264 38, linkat 265 37,
    symlinkat 266 36, fchmodat 268 53, fchmodat2 452 452, utimensat 280 88, renameat2 316 276, flock 73 32,
    fadvise64 221 223
""")
# Calls that are allowed or refused by their arguments.
_JUDGED = _numbers("""
    open 2 -, openat 257 56, socketpair 53 199, sendto 44 206, fcntl 72 25, ioctl 16 29, clone 56 220, prctl 157
    167, prlimit64 302 261
""")

# machine: its column above, and the kernel's constant for it (AUDIT_ARCH_...)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000  # numbers from here on are the x32 ABI of x86-64, in which every call has another number

# From here on, numbers are the same on all architectures, and libc can fall back to an older call.
_UNIFIED = 424

_THREAD = 0x00010000  # CLONE_THREAD
_WRITE_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND
_PAIR_TYPES = (0x1, 0x801, 0x80001, 0x80801)  # SOCK_STREAM, with SOCK_NONBLOCK and SOCK_CLOEXEC or without
# No datagram pairs: they could send to any address of this machine. `sendto` with an address and MSG_OOB are refused
# too.
_OUT_OF_BAND = 0x1
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETOWN, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. Excluded: setting owners,
# signals, leases, notifications, hints and pipe sizes.
_FCNTL = (0, 1, 2, 3, 4, 9, 1030, 1032)
_FCNTL_LOCKS = (5, 6, 7, 36, 37, 38)  # F_GETLK, F_SETLK, F_SETLKW, and the same for open file descriptions
# TCGETS, TIOCGPGRP, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS2. Excluded: setting terminals,
# their input (TIOCSTI), file flags (FS_IOC_SETFLAGS), and everything on devices.
_IOCTL = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)
# PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_CAPBSET_READ, PR_GET_NO_NEW_PRIVS, PR_SET_VMA. Excluded:
# PR_SET_PDEATHSIG, which ends the program with its runner.
_PRCTL = (3, 15, 16, 23, 39, 0x53564D41)

# A BPF instruction: code, jump offsets if true and if false, operand.
_Instruction = tuple[int, int, int, int]
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW: _Instruction = (_RETURN, 0, 0, 0x7FFF0000)
_KILL: _Instruction = (_RETURN, 0, 0, 0x80000000)


def _refuse(number: int = errno.EPERM) -> _Instruction:
    return (_RETURN, 0, 0, 0x00050000 | number)


def _argument(index: int, *, upper: bool = False) -> _Instruction:
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * upper)  # the lower half suffices for most arguments


def _one_of(index: int, values: tuple[int, ...]) -> list[_Instruction]:
    """Allow a call if the argument is one of the values, else refuse it."""
    tests = [(_IF_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values)]
    return [_argument(index), *tests, _refuse(), _ALLOW]


def filter_program(*, read_only: bool, machine: str | None = None) -> bytes:
    """Return the filter as the array of `struct sock_filter` that `prctl(PR_SET_SECCOMP)` takes.

    Args:
      read_only: whether to refuse all calls that change a file system, too.
      machine: the architecture, named as by `platform.machine()`; by default that of this machine.

    Raises:
      UserError: if the system is not Linux, or the architecture is neither x86-64 nor arm64.
    """
    machine = machine or platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES:
        known, here = " and ".join(_MACHINES), f"{sys.platform} on {machine}"
        raise UserError(f"code: programs can only be confined by Linux on {known}, and this is {here}")
    column, architecture = _MACHINES[machine]
    allowed = _FILES | _MEMORY | _SELF | _PAIRS
    fcntl: tuple[int, ...] = _FCNTL
    if not read_only:
        allowed |= _CHANGING
        fcntl += _FCNTL_LOCKS
    rules = {name: [_ALLOW] for name in allowed} | {
        "open": _opening(1, read_only),
        "openat": _opening(2, read_only),
        "socketpair": [_argument(0), (_IF_EQUAL, 1, 0, 1), _refuse(), *_one_of(1, _PAIR_TYPES)],  # AF_UNIX
        "sendto": [
            *(_argument(4), (_IF_EQUAL, 1, 0, 0), _refuse()),  # only to the other end of the pair
            *(_argument(4, upper=True), (_IF_EQUAL, 1, 0, 0), _refuse()),
            *(_argument(3), (_IF_ANY_BIT, 0, 1, _OUT_OF_BAND), _refuse(), _ALLOW),
        ],
        "fcntl": _one_of(1, fcntl),
        "ioctl": _one_of(1, _IOCTL),
        "clone": [_argument(0), (_IF_ANY_BIT, 1, 0, _THREAD), _refuse(), _ALLOW],
        "prctl": _one_of(0, _PRCTL),
        "prlimit64": _one_of(0, (0,)),  # its own limits
    }
    numbers = allowed | _JUDGED
    program: list[_Instruction] = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, architecture), _KILL, (_LOAD, 0, 0, 0)]
    if machine == "x86_64":
        program += [(_IF_AT_LEAST, 0, 1, _X32), _refuse(errno.ENOSYS)]
    for name, body in rules.items():
        number = numbers[name][column]
        if number is not None:
            program += [(_IF_EQUAL, 0, len(body), number), *body]
    program += [(_IF_AT_LEAST, 0, 1, _UNIFIED), _refuse(errno.ENOSYS), _refuse()]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _opening(flags: int, read_only: bool) -> list[_Instruction]:
    return [_argument(flags), (_IF_ANY_BIT, 0, 1, _WRITE_FLAGS), _refuse(), _ALLOW] if read_only else [_ALLOW]
