"""The filter, run by a small BPF interpreter on made-up system calls, for both architectures."""

import errno
import re
import struct
from pathlib import Path

import pytest

from lpo_jax.errors import UserError
from lpo_jax.rewards import seccomp
from lpo_jax.rewards.seccomp import filter_program

ALLOWED, KILLED, REFUSED, ABSENT = "allowed", "killed", errno.EPERM, errno.ENOSYS
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def decide(machine, number, *arguments, read_only=False, architecture=None):
    """Return the filter's decision on a system call."""
    code = [*struct.iter_unpack("=HBBI", filter_program(read_only=read_only, machine=machine))]
    data = struct.pack(
        "=IIQ6Q", number, architecture or ARCHITECTURES[machine], 0, *(*arguments, *[0] * 6)[:6]
    )
    value, at = 0, 0
    while True:
        kind, if_true, if_false, operand = code[at]
        at += 1
        if kind == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        elif kind == 0x06:
            if operand >> 16 == 5:
                return operand & 0xFFFF
            return {0x7FFF0000: ALLOWED, 0x80000000: KILLED}[operand]
        else:
            truth = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[kind]
            at += if_true if truth else if_false


@pytest.mark.parametrize(
    ("x86", "arm", "arguments", "decision"),
    [
        (0, 63, (), ALLOWED),  # read
        (59, 221, (), ALLOWED),  # execve: it remains one process
        (57, None, (), REFUSED),  # fork
        (56, 220, (17,), REFUSED),  # clone, as called by fork
        (56, 220, (0x3D0F00,), ALLOWED),  # clone, as called by pthread_create
        (435, 435, (), ABSENT),  # clone3
        (62, 129, (1, 9), REFUSED),  # kill
        (112, 157, (), REFUSED),  # setsid
        (41, 198, (2, 1), REFUSED),  # socket
        (53, 199, (1, 1), ALLOWED),  # socketpair
        (101, 117, (), REFUSED),  # ptrace
        (272, 97, (0x10000000,), REFUSED),  # unshare
        (319, 279, (), REFUSED),  # memfd_create
        (72, 25, (1, 8, 1), REFUSED),  # fcntl F_SETOWN
        (72, 25, (1, 15, 1), REFUSED),  # fcntl F_SETOWN_EX
        (72, 25, (1, 2, 1), ALLOWED),  # fcntl F_SETFD
        (16, 29, (1, 0x8902), REFUSED),  # ioctl SIOCSPGRP
        (16, 29, (1, 0x5401), ALLOWED),  # ioctl TCGETS
        (302, 261, (0, 7), ALLOWED),  # prlimit64 of its own process
        (302, 261, (1, 7), REFUSED),  # prlimit64 of another process
        (157, 167, (1, 0), REFUSED),  # prctl PR_SET_PDEATHSIG
        (157, 167, (15, 0), ALLOWED),  # prctl PR_SET_NAME
        (157, 167, (22, 2), REFUSED),  # prctl PR_SET_SECCOMP
        (157, 167, (62, 1), REFUSED),  # prctl PR_SCHED_CORE
        (53, 199, (1, 0x80001), ALLOWED),  # socketpair, as called by asyncio
        *[(53, 199, pair, REFUSED) for pair in ((1, 2), (1, 5), (1, 0x80002), (1, 3), (2, 1), (16, 3))],
        (44, 206, (3, 0x7000, 1, 0, 0, 0), ALLOWED),  # sendto, as called by send
        (44, 206, (3, 0x7000, 1, 0, 0x7F00, 110), REFUSED),  # sendto an address
        (44, 206, (3, 0x7000, 1, 0, 0x7F << 32, 110), REFUSED),
        (44, 206, (3, 0x7000, 1, 1, 0, 0), REFUSED),  # MSG_OOB
        *[(x86, arm, (), REFUSED) for x86, arm in ((46, 211), (307, 269))],  # sendmsg, sendmmsg
        *[
            (x86, arm, (), REFUSED) for x86, arm in ((49, 200), (42, 203), (50, 201), (43, 202), (288, 242))
        ],  # bind ...
        *[(x86, arm, (), REFUSED) for x86, arm in ((31, 195), (30, 196), (67, 197))],  # shmctl, shmat, shmdt
        *[
            (x86, arm, (), REFUSED) for x86, arm in ((66, 191), (71, 187), (241, 181))
        ],  # semctl, msgctl, mq_unlink
        *[
            (16, 29, (1, request), REFUSED) for request in (0x5402, 0x5403, 0x5404, 0x402C542B)
        ],  # TCSETS, ..., TCSETS2
        *[
            (16, 29, (1, request), REFUSED) for request in (0x5412, 0x540E, 0x541C)
        ],  # TIOCSTI, TIOCSCTTY, TIOCLINUX
        *[
            (16, 29, (1, request), REFUSED) for request in (0x40086602, 0x401C5820, 0x40049409)
        ],  # FS_IOC_SETFLAGS ...
        *[(16, 29, (1, request), ALLOWED) for request in (0x5413, 0x541B, 0x5421, 0x5451)],
        *[
            (72, 25, (1, command), REFUSED) for command in (10, 1024, 1026, 1031, 1033, 1036)
        ],  # F_SETSIG, leases ...
        *[(188 + n, 5 + n, (), REFUSED) for n in range(3)],  # setxattr, lsetxattr, fsetxattr
        *[
            (463 + n, 463 + n, (), ABSENT) for n in (0, 3, 5, 6)
        ],  # setxattrat, removexattrat, file_getattr, file_setattr
        (1023, 1023, (), ABSENT),  # a call that a later kernel may add
        *[
            (x86, arm, (), REFUSED) for x86, arm in ((206, 0), (222, 107), (253, 26), (300, 262))
        ],  # AIO, timers, notify
        *[
            (x86, arm, (), REFUSED) for x86, arm in ((149, 228), (275, 76), (278, 75), (135, 92))
        ],  # mlock, splice, ...
        *[
            (x86, arm, (), REFUSED) for x86, arm in ((162, 81), (103, 116), (169, 142), (317, 277))
        ],  # sync, syslog, ...
    ],
)
def test_decisions(x86, arm, arguments, decision):
    assert decide("x86_64", x86, *arguments) == decision
    if arm is not None:
        assert decide("aarch64", arm, *arguments) == decision


@pytest.mark.parametrize(
    ("x86", "arm", "arguments", "decision"),
    [
        (2, None, (0, 0o0), ALLOWED),  # open for reading
        (2, None, (0, 0o101), REFUSED),  # open for creating
        (257, 56, (0, 0, 0o2000000), ALLOWED),  # openat O_CLOEXEC
        *[(257, 56, (0, 0, flag), REFUSED) for flag in (0o1, 0o2, 0o100, 0o1000, 0o2000, 0o20200002)],
        (437, 437, (), ABSENT),  # openat2
        (263, 35, (), REFUSED),  # unlinkat
        (91, 52, (), REFUSED),  # fchmod
        (73, 32, (), REFUSED),  # flock, which also works on files opened for reading
        *[(72, 25, (1, command), REFUSED) for command in (6, 7, 37, 38)],  # fcntl F_SETLK ...
        (452, 452, (), ABSENT),  # fchmodat2
        (57, None, (), REFUSED),
        (1, 64, (), ALLOWED),  # write
    ],
)
def test_decisions_where_files_stay_as_they_are(x86, arm, arguments, decision):
    for machine, number in (("x86_64", x86), ("aarch64", arm)):
        if number is not None:
            assert decide(machine, number, *arguments, read_only=True) == decision


def test_files_of_its_own_may_be_changed_and_locked():
    for x86, arm, *arguments in (
        (257, 56, 0, 0, 0o102),
        (263, 35),
        (73, 32),
        (72, 25, 1, 6),
        (452, 452),
        (91, 52),
    ):
        assert decide("x86_64", x86, *arguments) == decide("aarch64", arm, *arguments) == ALLOWED


@pytest.mark.parametrize("column", [0, 1])
def test_numbers_are_those_of_the_kernel(column):
    """Compare with the kernel's headers if they are installed; on every machine, check that no number is used twice."""
    tables = (
        seccomp._FILES,
        seccomp._MEMORY,
        seccomp._SELF,
        seccomp._PAIRS,
        seccomp._CHANGING,
        seccomp._JUDGED,
    )
    numbers = {
        name: row[column] for table in tables for name, row in table.items() if row[column] is not None
    }
    assert (
        len(set(numbers.values()))
        == len(numbers)
        == sum(row[column] is not None for t in tables for row in t.values())
    )
    header = next(Path("/usr/include").glob(("**/asm/unistd_64.h", "asm-generic/unistd.h")[column]), None)
    if header is None:
        pytest.skip("no kernel headers here")
    known = {
        name: int(number) for name, number in re.findall(r"__NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    }
    if column == 1:
        known["newfstatat"] = known["fstatat"]
    assert {name: known.get(name, number) for name, number in numbers.items()} == numbers


def test_another_architecture_in_the_same_process():
    assert decide("x86_64", 0, architecture=0x40000003) == KILLED  # i386
    assert decide("x86_64", 0x40000000 | 57) == ABSENT  # x32
    with pytest.raises(UserError, match="this is linux on riscv64"):
        filter_program(read_only=False, machine="riscv64")
