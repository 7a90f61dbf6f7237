"""Checksums of the files of checkpoints, so that a damaged checkpoint is never restored.

Each checkpoint holds `checksums.sha256`, which lists all its other files in the format of `sha256sum`; to check it by
hand, run `sha256sum -c checksums.sha256` in the checkpoint. A single file that is often rewritten has its checksum in
its last line (`write_checked`, `read_checked`).
"""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from etils import epath
from orbax.checkpoint.path import atomicity

from lpo_jax.errors import UserError
from lpo_jax.files import sync, write_atomically
from lpo_jax.parallel import hosts

NAME = "checksums.sha256"
_THREADS = 8  # hashlib releases the GIL; a large checkpoint has many files


class SealedDirectory(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary directory of a save, whose files are listed and synced before it is renamed."""

    async def finalize(self) -> None:
        if self._checkpoint_metadata_store is None:  # a part of a checkpoint; only the whole is sealed
            return await super().finalize()
        self._checkpoint_metadata_store.wait_until_finished()
        seal(self.get())
        self.get().rename(self.get_final())
        _sync(self.get_final().parent)


class SealedObjects(atomicity.CommitFileTemporaryPath):
    """The same on object stores, which cannot rename: a file that is written last marks a complete checkpoint."""

    async def finalize(self) -> None:
        if self._checkpoint_metadata_store is None:
            return await super().finalize()
        self._checkpoint_metadata_store.wait_until_finished()
        seal(self.get())
        (self.get() / atomicity.COMMIT_SUCCESS_FILE).write_text("")


def temporary_path(directory: epath.Path) -> type[atomicity.TemporaryPathBase]:
    """Return the class that makes saves of Orbax in `directory` atomic."""
    return SealedDirectory if _is_local(directory) else SealedObjects


def seal(directory: epath.Path) -> None:
    """Write the checksums of a directory's files, and sync files and checksums to the disk."""
    names = sorted(_files(directory))

    def line(name: str) -> str:
        _sync(directory / name)
        return f"{_digest(directory / name)}  {name}\n"

    with ThreadPoolExecutor(_THREADS) as threads:
        (directory / NAME).write_text("".join(threads.map(line, names)))
    _sync(directory / NAME)
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    for folder in sorted(folders, reverse=True):  # the deepest first; "." is the directory itself
        _sync(directory / folder)


def damage(directory: epath.Path) -> str | None:
    """Compare a directory with the checksums that `seal` wrote; returns a problem, or None if there is none.

    All hosts of a job call it together, and each reads its share of the files.
    """
    listed, problem = hosts.on_first(lambda: _listed(directory))
    if problem:
        return problem

    def differs(name: str) -> str | None:
        try:
            return None if _digest(directory / name) == listed[name] else f"{name} differs from its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"

    names = sorted(listed)
    with ThreadPoolExecutor(_THREADS) as threads:
        mine = list(threads.map(differs, names[hosts.share(len(names))]))
    return next((problem for problem in hosts.gather_lists(mine) if problem), None)


def write_checked(path: epath.Path, text: str) -> None:
    """Write a text of one line and its checksum atomically, and sync the file."""
    whole = f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"
    if not _is_local(path):
        path.write_text(whole)  # objects are written atomically
        return
    write_atomically(Path(path), whole.encode())


def read_checked(path: epath.Path) -> str:
    """Read the text of a file that `write_checked` wrote.

    Raises:
      UserError: the file is damaged or cannot be read.
    """
    try:
        text, _, digest = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if digest != f"{hashlib.sha256(text).hexdigest()}\n".encode():
        raise UserError(f"{path}: is damaged: it differs from the checksum in its last line")
    return text.decode()


def _listed(directory: epath.Path) -> tuple[dict[str, str], str | None]:
    """Read file names with their checksums, and a problem of the list, if any."""
    try:
        text = (directory / NAME).read_bytes().decode()
        there = set(_files(directory))
    except FileNotFoundError:
        return {}, f"{NAME} is missing"
    except OSError as error:
        return {}, f"cannot be read ({error.strerror or error})"
    except UnicodeDecodeError:
        return {}, f"{NAME} is not in its format"
    *lines, rest = text.split("\n")
    rows = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    names = {row[2] for row in rows if row}
    if rest or len(names) < len(lines):
        return {}, f"{NAME} is not in its format"
    for name in sorted(names ^ there):
        return {}, f"{name} is missing" if name in names else f"{name} is not listed in {NAME}"
    return {row[2]: row[1] for row in rows}, None


def _files(directory: epath.Path, below: str = "") -> Iterator[str]:
    """Yield relative paths of all files except the list itself and the commit file of object stores."""
    for path in (directory / below).iterdir():
        name = f"{below}{path.name}"
        if path.is_dir():
            yield from _files(directory, f"{name}/")
        elif name not in (NAME, atomicity.COMMIT_SUCCESS_FILE):
            yield name


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


def _sync(path: epath.Path) -> None:
    """Sync a file or a directory to the disk; object stores need no sync."""
    if _is_local(path):
        sync(path)
