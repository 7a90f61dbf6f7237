"""Atomic writes, appends and locks, which every room uses."""

import errno
import os

import pytest

from lpo_jax import files
from lpo_jax.errors import UserError


def test_write_file_creates_directories_and_encodes_lone_surrogates(tmp_path):
    path = tmp_path / "a" / "b.txt"
    files.write_file(path, "é\udc80")
    assert path.read_bytes() == "é\\udc80".encode()
    assert [child.name for child in path.parent.iterdir()] == ["b.txt"]


def test_a_failed_write_keeps_the_old_content_and_raises_one_line(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_file(path, b"old")
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=f"cannot write {path}: .*resume") as error,
    ):
        patch.setattr(os, "fsync", _full)
        files.write_file(path, b"new")
    assert path.read_bytes() == b"old" and "\n" not in str(error.value)


def test_a_failed_append_restores_the_size(tmp_path, monkeypatch):
    with open(tmp_path / "file", "ab", buffering=0) as file:
        files.append(file, b"one\n")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, "fsync", _full)
            files.append(file, b"two\n")
        files.append(file, b"three\n")
    assert (tmp_path / "file").read_bytes() == b"one\nthree\n"


def test_a_directory_is_locked_until_its_lock_is_closed(tmp_path):
    lock = files.lock_directory(tmp_path / "new", "run")
    with lock, pytest.raises(UserError, match="another process is writing to this run"):
        files.lock_directory(tmp_path / "new", "run")
    files.lock_directory(tmp_path / "new", "run").close()


def _full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
