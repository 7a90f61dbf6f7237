"""The filter, run by a small BPF machine on made-up system calls: what it lets through on either kind of processor."""

import errno
import struct

import pytest

from lpo_jax.errors import UserError
from lpo_jax.rewards.seccomp import filter_program

ALLOWED, KILLED, REFUSED, ABSENT = "allowed", "killed", errno.EPERM, errno.ENOSYS
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def decide(machine, number, *arguments, read_only=False, architecture=None):
    """What becomes of a system call."""
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
        (59, 221, (), ALLOWED),  # execve: it stays one process
        (57, None, (), REFUSED),  # fork
        (56, 220, (17,), REFUSED),  # clone, as fork calls it
        (56, 220, (0x3D0F00,), ALLOWED),  # clone, as pthread_create calls it
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
        (302, 261, (0, 7), ALLOWED),  # prlimit64 of itself
        (302, 261, (1, 7), REFUSED),  # prlimit64 of another
        (157, 167, (1, 0), REFUSED),  # prctl PR_SET_PDEATHSIG
        (157, 167, (15, 0), ALLOWED),  # prctl PR_SET_NAME
    ],
)
def test_decisions(x86, arm, arguments, decision):
    assert decide("x86_64", x86, *arguments) == decision
    if arm is not None:
        assert decide("aarch64", arm, *arguments) == decision


@pytest.mark.parametrize(
    ("x86", "arm", "arguments", "decision"),
    [
        (2, None, (0, 0o0), ALLOWED),  # open to read
        (2, None, (0, 0o101), REFUSED),  # open to create
        (257, 56, (0, 0, 0o2000000), ALLOWED),  # openat O_CLOEXEC
        *[(257, 56, (0, 0, flag), REFUSED) for flag in (0o1, 0o2, 0o100, 0o1000, 0o2000, 0o20200002)],
        (437, 437, (), ABSENT),  # openat2
        (263, 35, (), REFUSED),  # unlinkat
        (91, 52, (), REFUSED),  # fchmod
        (57, None, (), REFUSED),
        (1, 64, (), ALLOWED),  # write
    ],
)
def test_decisions_where_files_stay_as_they_are(x86, arm, arguments, decision):
    for machine, number in (("x86_64", x86), ("aarch64", arm)):
        if number is not None:
            assert decide(machine, number, *arguments, read_only=True) == decision


def test_another_architecture_in_the_same_process():
    assert decide("x86_64", 0, architecture=0x40000003) == KILLED  # i386
    assert decide("x86_64", 0x40000000 | 57) == ABSENT  # x32
    with pytest.raises(UserError, match="this is linux on riscv64"):
        filter_program(read_only=False, machine="riscv64")
