"""The system calls that an untrusted program may not make, as a filter for the kernel (seccomp-BPF).

A program under this filter stays one process (it may start threads), cannot signal, trace or change another one,
opens no socket, and keeps no memory that its own address space does not account for. Calls that are not named
here are allowed: the filter closes ways out, and does not try to list what Python needs.

References: `man 2 seccomp`; the numbers are those of the kernel's `asm/unistd.h`.
"""

import errno
import platform
import struct
import sys

from lpo_jax.errors import UserError

# name: its number on x86-64 and on arm64; None where there is no such call.
_Numbers = dict[str, tuple[int | None, int | None]]

_PROCESSES: _Numbers = {
    "fork": (57, None),
    "vfork": (58, None),
    "kill": (62, 129),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "ptrace": (101, 117),
    "rt_sigqueueinfo": (129, 138),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "tkill": (200, 130),
    "sched_setaffinity": (203, 122),
    "tgkill": (234, 131),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "rt_tgsigqueueinfo": (297, 240),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "sched_setattr": (314, 274),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
}
_KERNEL: _Numbers = {  # namespaces, mounts, and what most holes in kernels were found in
    "socket": (41, 198),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "perf_event_open": (298, 241),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
}
_MEMORY: _Numbers = {  # memory that outlives its mapping, so that a limit on the address space does not bound it
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
}
_WRITING: _Numbers = {  # what changes a file system, beside opening a file to write to it
    "truncate": (76, 45),
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "creat": (85, None),
    "link": (86, None),
    "unlink": (87, None),
    "symlink": (88, None),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "utime": (132, None),
    "mknod": (133, None),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utimes": (235, None),
    "mkdirat": (258, 34),
    "mknodat": (259, 33),
    "fchownat": (260, 54),
    "futimesat": (261, None),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "fchmodat": (268, 53),
    "utimensat": (280, 88),
    "renameat2": (316, 276),
    "fchmodat2": (452, 452),
}
_ARGUMENTS: _Numbers = {  # calls that are judged by an argument
    "open": (2, None),
    "ioctl": (16, 29),
    "clone": (56, 220),
    "fcntl": (72, 25),
    "prctl": (157, 167),
    "openat": (257, 56),
    "prlimit64": (302, 261),
    "clone3": (435, 435),
    "openat2": (437, 437),
}

# machine: its column above, and what the kernel calls it (AUDIT_ARCH_...)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000  # numbers from here on are x86-64's second set, under which every call has another number

_THREAD = 0x00010000  # CLONE_THREAD
_PDEATHSIG = 1  # PR_SET_PDEATHSIG, by which it ends with its runner
_WRITE_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND
_OWNERS = {
    "fcntl": (8, 15),
    "ioctl": (0x8901, 0x8902),
}  # F_SETOWN(_EX), FIOSETOWN, SIOCSPGRP: signals by proxy

# A BPF instruction: code, how far to jump if true and if false, operand.
_Instruction = tuple[int, int, int, int]
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW: _Instruction = (_RETURN, 0, 0, 0x7FFF0000)
_KILL: _Instruction = (_RETURN, 0, 0, 0x80000000)


def _refuse(number: int = errno.EPERM) -> _Instruction:
    return (_RETURN, 0, 0, 0x00050000 | number)


def _argument(index: int) -> _Instruction:
    return (_LOAD, 0, 0, 16 + 8 * index)  # its lower half: all that these arguments use


def filter_program(*, read_only: bool, machine: str | None = None) -> bytes:
    """The filter, as the array of `struct sock_filter` that `prctl(PR_SET_SECCOMP)` takes.

    Args:
      read_only: also refuse whatever changes a file system.
      machine: as `platform.machine()` says; by default this one.

    Raises:
      UserError: if it is not Linux, or the machine neither x86-64 nor arm64.
    """
    machine = machine or platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES:
        known, here = " and ".join(_MACHINES), f"{sys.platform} on {machine}"
        raise UserError(f"code: programs can only be confined by Linux on {known}, and this is {here}")
    column, architecture = _MACHINES[machine]
    rules: list[tuple[str, list[_Instruction]]] = [
        (
            "clone3",
            [_refuse(errno.ENOSYS)],
        ),  # its flags are out of a filter's sight; libc falls back to clone
        ("clone", [_argument(0), (_IF_ANY_BIT, 1, 0, _THREAD), _refuse(), _ALLOW]),
        ("prlimit64", [_argument(0), (_IF_EQUAL, 1, 0, 0), _refuse(), _ALLOW]),  # 0: its own limits
    ]
    rules.append(("prctl", [_argument(0), (_IF_EQUAL, 0, 1, _PDEATHSIG), _refuse(), _ALLOW]))
    for name, (first, second) in _OWNERS.items():
        tests = [(_IF_EQUAL, 1, 0, first), (_IF_EQUAL, 0, 1, second)]
        rules.append((name, [_argument(1), *tests, _refuse(), _ALLOW]))
    refused = _PROCESSES | _KERNEL | _MEMORY
    if read_only:
        refused |= _WRITING
        rules.append(("openat2", [_refuse(errno.ENOSYS)]))  # as for clone3
        for name, flags in (("open", 1), ("openat", 2)):
            rules.append((name, [_argument(flags), (_IF_ANY_BIT, 0, 1, _WRITE_FLAGS), _refuse(), _ALLOW]))
    rules += [(name, [_refuse()]) for name in refused]

    numbers = _ARGUMENTS | refused
    program: list[_Instruction] = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, architecture), _KILL, (_LOAD, 0, 0, 0)]
    if machine == "x86_64":
        program += [(_IF_AT_LEAST, 0, 1, _X32), _refuse(errno.ENOSYS)]
    for name, body in rules:
        number = numbers[name][column]
        if number is not None:
            program += [(_IF_EQUAL, 0, len(body), number), *body]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in [*program, _ALLOW])
