"""Rows on disk as a TFDS data set: checked and written once, then read when they are asked for.

A source's rows are converted, freed of duplicates and written by a TFDS builder in array_record files, without
TensorFlow, under the cache folder. The place is named by a hash of the source files' content, of what the task
makes of them and of the code that does it: it is never stale, and a second start finds it. Rows have random access
from disk, so a hundred thousand of them cost no memory.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lpo_jax.errors import UserError
from lpo_jax.hub import cache_dir
from lpo_jax.tasks.data import plain
from lpo_jax.tasks.records import find_files, read_data_file, unique_ids
from lpo_jax.tasks.task import Row

_BLOCK = 1024  # rows read together: one at a time costs ten times as much
_NAMED = 5  # skipped rows whose place and reason are kept


class Unusable(Exception):
    """A row whose gold answer cannot be used; the text says why. Such rows are skipped and counted, or refused."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a task makes of the rows of a file.

    Attributes:
      name: of the task.
      columns: of the rows made: name -> `"text"`, `"int"`, `"ints"` or `"json"` (any JSON value, stored as text).
      convert: what the file holds -> a row; None where the row is of another kind than wanted. Raises `Unusable`,
        and `UserError` for a row that lacks a field.
      key: row -> what makes two rows the same problem.
      settings: all options that `convert` and `key` depend on, as JSON values.
    """

    name: str
    columns: Mapping[str, str]
    convert: Callable[[Row], Row | None]
    key: Callable[[Row], Hashable]
    settings: Mapping[str, Any]


class DiskRows(Sequence):
    """Rows read from disk when they are asked for; loops read them in blocks.

    Args:
      source: a TFDS data source.
      convert: (index, what is stored) -> row.
      indices: which rows of the source these are, in order; default all.
    """

    def __init__(self, source: Any, convert: Callable[[int, Row], Row], indices: Sequence[int] | None = None):
        self._source, self._convert = source, convert
        self._indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return list(self._read(self._indices[index]))
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._convert(self._indices[index], plain(self._source[self._indices[index]]))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _BLOCK):
            yield from self._read(self._indices[start : start + _BLOCK])

    def _read(self, indices: Sequence[int]) -> Iterator[Row]:
        stored = self._source.__getitems__(list(indices)) if indices else ()
        return (self._convert(index, plain(row)) for index, row in zip(indices, stored))

    def select(self, indices: Sequence[int]) -> "DiskRows":
        """Some of these rows, in the order given."""
        return DiskRows(self._source, self._convert, [self._indices[index] for index in indices])


def prepare_rows(
    recipe: Recipe, source: str, split: str, leave_out: Collection[Hashable] = ()
) -> tuple[DiskRows, dict[str, Any]]:
    """The rows that a recipe makes of a source, in its order; from the cache, or written there now.

    Args:
      recipe: what to make of them.
      source, split: see `records.find_files`.
      leave_out: keys of rows to leave out, because they are held out.

    Returns:
      The rows, and what became of those of the source: how many were `read`, `kept`, `skipped` (unusable), of an
      `other_kind`, `duplicates` and `held_out`, and `first_skipped`, the first ones with their reasons.

    Raises:
      UserError: if a file is not there or damaged, a row is not as it must be, an id comes twice, no row is left, or
        the cache cannot be written.
    """
    files, leave_out = find_files(source, split), {_digest(key) for key in leave_out}
    fingerprint = hashlib.sha256(_code_digest())
    settings = [recipe.name, recipe.columns, recipe.settings, sorted(leave_out)]
    fingerprint.update(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        try:
            with open(path, "rb") as file:
                fingerprint.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
    folder = cache_dir() / "tasks" / fingerprint.hexdigest()[:24]
    if not folder.exists():
        _write(recipe, source, files, leave_out, folder)

    import tensorflow_datasets  # here, for it is slow to import

    builder = tensorflow_datasets.builder_from_directory(folder / _VERSION)
    packed = [column for column, kind in recipe.columns.items() if kind == "json"]

    def unpack(index: int, row: Row) -> Row:
        return {**row, **{column: json.loads(row[column]) for column in packed}}

    return DiskRows(builder.as_data_source(_SPLIT), unpack), dict(builder.info.metadata)


_SPLIT, _VERSION = "train", "1.0.0"  # of the builder: each holds the rows of one source


def _write(recipe: Recipe, source: str, files: list[Path], leave_out: set[str], folder: Path) -> None:
    print(f"preparing {recipe.name} from {source}", file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            builder = _builder(recipe, source, files, leave_out, scratch)
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself
                builder.download_and_prepare()
            os.rename(Path(builder.data_dir).parent, folder)  # whole or not at all
    except OSError as error:
        if folder.exists():
            return  # another process was faster; its rows are the same
        raise UserError(f"{folder.parent} cannot be written ({error}); set LPO_CACHE") from None


def _builder(recipe: Recipe, source: str, files: list[Path], leave_out: set[str], data_dir: str):
    """The TFDS builder that writes the rows of these files."""
    import numpy as np
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    text = tfds.features.Text
    kinds = {
        "text": text,
        "json": text,
        "int": lambda: np.int64,
        "ints": lambda: tfds.features.Sequence(np.int64),
    }

    class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = recipe.name.replace("-", "_")
        VERSION = tfds.core.Version(_VERSION)
        code_path = None  # no checksums and no citation lie beside this file for TFDS to find

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({c: kinds[kind]() for c, kind in recipe.columns.items()}),
                metadata=tfds.core.MetadataDict(),
                disable_shuffling=True,  # rows keep the order of the files
            )

        def _split_generators(self, _):
            return {_SPLIT: self._generate_examples()}

        def _generate_examples(self):
            for index, row in enumerate(_converted(recipe, source, files, leave_out, self.info.metadata)):
                packed = {
                    c: json.dumps(row[c]) if kind == "json" else row[c] for c, kind in recipe.columns.items()
                }
                yield index, packed

    return Rows(data_dir=data_dir, file_format="array_record")


def _converted(
    recipe: Recipe, source: str, files: list[Path], leave_out: set[str], about: dict[str, Any]
) -> Iterator[Row]:
    """The rows to keep; what becomes of the others is counted in `about`."""
    about |= dict.fromkeys(("read", "kept", "skipped", "other_kind", "duplicates", "held_out"), 0)
    about["first_skipped"] = []
    seen: set[str] = set()
    for path in files:
        for place, stored in unique_ids(read_data_file(path)):
            about["read"] += 1
            try:
                row = recipe.convert(stored)
            except Unusable as reason:
                about["skipped"] += 1
                if len(about["first_skipped"]) < _NAMED:
                    about["first_skipped"].append(f"{place}: {reason}")
                continue
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
            if row is None:
                about["other_kind"] += 1
                continue
            key = _digest(recipe.key(row))
            if key in leave_out or key in seen:
                about["held_out" if key in leave_out else "duplicates"] += 1
                continue
            seen.add(key)
            about["kept"] += 1
            yield row
    if not about["kept"]:
        reasons = ", ".join(
            f"{about[what]} {what.replace('_', ' ')}" for what in ("skipped", "other_kind", "held_out")
        )
        first = f" (first: {about['first_skipped'][0]})" if about["skipped"] else ""
        raise UserError(f"{source}: none of its {about['read']} rows can be used: {reasons}{first}")


def _digest(key: Hashable) -> str:
    return hashlib.blake2b(repr(key).encode(), digest_size=12).hexdigest()


def _code_digest() -> bytes:
    """Of the code that converts rows and checks their answers: rows prepared by other code are made anew."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted([*package.glob("tasks/*.py"), *package.glob("rewards/*.py")]):
        digest.update(path.read_bytes())
    return digest.digest()
