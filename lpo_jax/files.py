"""Writing and locking files such that a killed process or a full disk leaves no half-written file behind.

`write_atomically`, `append` and `sync` raise `OSError`; `write_file` and `lock_directory` raise the one-line
`UserError` that `cannot_write` makes of it.
"""

import fcntl
import os
from io import FileIO
from pathlib import Path
from typing import TextIO

from lpo_jax.errors import UserError

LOCK = ".lock"  # the file in a directory that `lock_directory` locks


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file atomically, as `write_atomically` does, and create its directory if needed.

    Args:
      path: the file to create or to replace.
      data: the content. Text is encoded as UTF-8; lone surrogates become backslash escapes.

    Raises:
      UserError: the file cannot be written, for example because the disk is full.
    """
    data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file such that readers see the old content or the new content, also after a crash.

    The data and the directory entry are synced to the disk before the function returns.

    Raises:
      OSError: the file cannot be written. The old content is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def append(file: FileIO, data: bytes) -> None:
    """Append to an unbuffered file and sync it to the disk.

    Raises:
      OSError: the data cannot be written. The file is truncated to its previous size.
    """
    size = os.fstat(file.fileno()).st_size
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def sync(path: str | os.PathLike) -> None:
    """Sync a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_directory(directory: Path, content: str) -> TextIO:
    """Create a directory if needed and lock it against other processes.

    Args:
      directory: the directory; the lock is an advisory lock on the file `LOCK` in it.
      content: what the directory contains, for the error message: "run" or "evaluation".

    Returns:
      The open lock file, which is a context manager. Closing it releases the lock.

    Raises:
      UserError: another process holds the lock, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / LOCK, "w")  # noqa: SIM115 - open as long as the lock is held
    except OSError as error:
        raise cannot_write(directory, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise UserError(f"{directory}: another process is writing to this {content}") from None
        raise cannot_write(directory, error) from None
    return file


def cannot_write(path: str | os.PathLike, error: OSError) -> UserError:
    """Return the one-line error for a file that cannot be written."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}; free space or permit writing, then resume"
    )
