"""Prepare rows as a TFDS dataset on disk: they are checked and written once, then read on access.

The rows of a source are converted, deduplicated, and written by a TFDS builder to array_record files under the cache
folder, without TensorFlow. The folder is named by a hash of the content of the source files, the task's options, and
the code that converts the rows, so it is never stale, and a later start reuses it. Rows have random access on disk, so
a hundred thousand of them take no memory.
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

from lpo_jax.errors import UserError
from lpo_jax.hub import cache_dir
from lpo_jax.tasks.data import plain
from lpo_jax.tasks.images import EncodedImage, ImageReader
from lpo_jax.tasks.records import find_files, read_data_file, unique_ids
from lpo_jax.tasks.task import Row
from lpo_jax.types import Json

_BLOCK = 1024  # rows read at once; reading one at a time takes ten times as long
_NAMED = 5  # skipped rows whose location and reason are recorded


class Unusable(Exception):
    """A row's gold answer cannot be used, for the reason in the text. Such rows are skipped and counted, or refused."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a task converts the rows of a file.

    Attributes:
      name: the name of the task.
      columns: the columns of the converted rows: name -> "text", "int", "ints" or "json" (any JSON value, stored as
        text). Rows with images have the column `images` besides, in which they stay encoded.
      convert: maps a row of the file to a row of the task, or to None if the row is of another kind. It raises
        `Unusable`, or `UserError` for a row that lacks a field.
      key: maps a row to a key that identifies its problem.
      settings: all options that `convert` and `key` depend on, as JSON values.
      images: reads the images of a row of the file; they are added to the converted row. None for rows of text.
    """

    name: str
    columns: Mapping[str, str]
    convert: Callable[[Row], Row | None]
    key: Callable[[Row], Hashable]
    settings: Mapping[str, Json]
    images: ImageReader | None = None


class DiskRows(Sequence):
    """A sequence of rows that are read from disk on access; iteration reads them in blocks.

    Args:
      source: a TFDS data source.
      convert: maps an index and the stored row, whose texts are bytes, to a row.
      indices: the rows of the source that the sequence consists of, in order; by default all.
    """

    def __init__(
        self, source: Json, convert: Callable[[int, Row], Row], indices: Sequence[int] | None = None
    ):
        self._source, self._convert = source, convert
        self._indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int | slice) -> Row | list[Row]:  # type: ignore[override]
        if isinstance(index, slice):
            return list(self._read(self._indices[index]))
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._convert(self._indices[index], self._source[self._indices[index]])

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _BLOCK):
            yield from self._read(self._indices[start : start + _BLOCK])

    def _read(self, indices: Sequence[int]) -> Iterator[Row]:
        stored = self._source.__getitems__(list(indices)) if indices else ()
        return (self._convert(index, row) for index, row in zip(indices, stored))

    def select(self, indices: Sequence[int]) -> "DiskRows":
        """Return the rows with the given indices, in that order."""
        return DiskRows(self._source, self._convert, [self._indices[index] for index in indices])


def prepare_rows(
    recipe: Recipe, source: str, split: str, leave_out: Collection[Hashable] = ()
) -> tuple[DiskRows, dict[str, Json]]:
    """Return the converted rows of a source, in its order; they are written to the cache unless they are there already.

    Args:
      recipe: how to convert the rows.
      source, split: see `records.find_files`.
      leave_out: keys of rows to exclude, because they are held out.

    Returns:
      The rows, and counts of the rows of the source: how many were `read`, `kept`, `skipped` (unusable), of an
      `other_kind`, `duplicates` and `held_out`; and `first_skipped`, the first skipped rows with their reasons.

    Raises:
      UserError: if a file is missing or damaged, a row is invalid, an id occurs twice, no row is left, or the cache
        cannot be written.
    """
    files, held_out = find_files(source, split), {_digest(key) for key in leave_out}
    fingerprint = hashlib.sha256(_code_digest())
    settings = [recipe.name, recipe.columns, recipe.settings, sorted(held_out)]
    fingerprint.update(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        try:
            with open(path, "rb") as file:
                fingerprint.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        for image_file in _image_files(recipe, path):
            status = image_file.stat()
            fingerprint.update(f"{image_file} {status.st_size} {status.st_mtime_ns}".encode())
    folder = cache_dir() / "tasks" / fingerprint.hexdigest()[:24]
    if not folder.exists():
        _write(recipe, source, files, held_out, folder)

    import tensorflow_datasets  # imported here, because it is slow to import

    builder = tensorflow_datasets.builder_from_directory(folder / _VERSION)
    packed = [column for column, kind in recipe.columns.items() if kind == "json"]

    def unpack(index: int, stored: Row) -> Row:
        row = plain({column: stored[column] for column in recipe.columns})
        row |= {column: json.loads(row[column]) for column in packed}
        if recipe.images:
            images = zip(stored["images"]["data"], stored["images"]["source"])
            row["images"] = [EncodedImage(bytes(data), source.decode()) for data, source in images]
        return row

    return DiskRows(builder.as_data_source(_SPLIT), unpack), dict(builder.info.metadata)


def _image_files(recipe: Recipe, path: Path) -> list[Path]:
    """Return the files with the images of the rows of a file, in order."""
    files: dict[Path, None] = {}
    for where, stored in read_data_file(path) if recipe.images else ():
        try:
            files |= dict.fromkeys(recipe.images.files(stored, path.parent))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return list(files)


_SPLIT, _VERSION = "train", "1.0.0"  # of every builder, which holds the rows of one source


def _write(recipe: Recipe, source: str, files: list[Path], leave_out: set[str], folder: Path) -> None:
    print(f"preparing {recipe.name} from {source}", file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            builder = _builder(recipe, source, files, leave_out, scratch)
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints progress
                builder.download_and_prepare()
            os.rename(Path(builder.data_dir).parent, folder)  # atomic
    except OSError as error:
        if folder.exists():
            return  # another process has written the same rows
        raise UserError(f"{folder.parent} cannot be written ({error}); set LPO_CACHE") from None


def _builder(recipe: Recipe, source: str, files: list[Path], leave_out: set[str], data_dir: str):
    """Return the TFDS builder that writes the rows of these files."""
    import numpy as np
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    text, sequence = tfds.features.Text, tfds.features.Sequence
    kinds = {"text": text, "json": text, "int": lambda: np.int64, "ints": lambda: sequence(np.int64)}
    features = {column: kinds[kind]() for column, kind in recipe.columns.items()}
    if recipe.images:
        data = tfds.features.Tensor(shape=(), dtype=np.object_)
        features["images"] = sequence({"data": data, "source": text()})

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = recipe.name.replace("-", "_")
        VERSION = tfds.core.Version(_VERSION)
        code_path = None  # TFDS must not search for checksums and citations beside this file

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
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
                if recipe.images:
                    packed["images"] = [
                        {"data": image.data, "source": image.source} for image in row["images"]
                    ]
                yield index, packed

    return Builder(data_dir=data_dir, file_format="array_record")


def _converted(
    recipe: Recipe, source: str, files: list[Path], leave_out: set[str], about: dict[str, Json]
) -> Iterator[Row]:
    """Yield the rows to keep, and count all rows in `about`."""
    about |= dict.fromkeys(("read", "kept", "skipped", "other_kind", "duplicates", "held_out"), 0)
    about["first_skipped"] = []
    seen: set[str] = set()
    for path in files:
        for where, stored in unique_ids(read_data_file(path)):
            about["read"] += 1
            try:
                row = recipe.convert(stored)
                if row is not None and recipe.images:
                    row = {**row, "images": recipe.images.read(stored, path.parent)}
            except Unusable as reason:
                about["skipped"] += 1
                if len(about["first_skipped"]) < _NAMED:
                    about["first_skipped"].append(f"{where}: {reason}")
                continue
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
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
    """Hash the code that converts rows and checks answers, so that rows are prepared again after it has changed."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted([*package.glob("tasks/*.py"), *package.glob("rewards/*.py")]):
        digest.update(path.read_bytes())
    return digest.digest()
