"""Read rows, as dicts, from files, folders and datasets of the Hugging Face hub.

A source is one string:

- a file: `.jsonl` (one JSON object per line), `.json` (a list of objects, or lines), either of them compressed as
  `.gz`, or `.parquet`;
- a pattern of such files: `data/part-*.parquet`;
- a folder: the files in it whose path contains the name of the split, or all files if no path contains any split's
  name;
- `hf:org/name[@revision][:pattern]`: a dataset on the hub. Its files are selected in the same way and kept in the hub's
  own cache, so that a second start needs no network.
"""

import fnmatch
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from lpo_jax.errors import UserError
from lpo_jax.hub import hub_failure
from lpo_jax.json_lines import MAX_DEPTH, deeper_than, loads, too_deep
from lpo_jax.types import Json

SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")

# Names of the splits in file paths, in order of preference.
SPLIT_WORDS = {"train": ("train",), "heldout": ("heldout", "test", "validation", "valid", "val", "dev")}

_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::(.+))?")


def find_files(source: str, split: str) -> list[Path]:
    """Return the local files of a source, which are downloaded if necessary.

    Args:
      source: see the module's docstring.
      split: "train" or "heldout"; selects among the files of a folder or a hub dataset.

    Raises:
      UserError: if there is no such file, or the download fails.
    """
    if source.startswith("hf:"):
        return _from_hub(source, split)
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return _choose(source, Path(path), split)
    if os.path.exists(path):
        if not path.endswith(SUFFIXES):
            raise UserError(f"{source}: not a data file; its name must end in {', '.join(SUFFIXES)}")
        return [Path(path)]
    found = [Path(name) for name in sorted(glob.glob(path)) if name.endswith(SUFFIXES)]
    if not found:
        hub = f"; did you mean hf:{source}?" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise UserError(f"{source}: No such file or directory{hub}")
    return found


def read_data_file(path: Path) -> Iterator[tuple[str, dict[str, Json]]]:
    """Yield the location and content of every row of a file, such as `("a.jsonl:7", {...})`.

    Raises:
      UserError: if the file is missing, empty or damaged, or a row is not an object; the message names file and row.
    """
    read = _parquet if path.suffix == ".parquet" else _json
    where = None
    try:
        for where, row in read(path):
            if not isinstance(row, dict):
                raise UserError(
                    f"{where}: a row must be a JSON object with named fields, not {json.dumps(row)[:60]}"
                )
            yield where, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text after {where or 'its beginning'}: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if where is None:
        raise UserError(f"{path}: the file is empty")


def unique_ids(rows: Iterable[tuple[str, dict[str, Json]]]) -> Iterator[tuple[str, dict[str, Json]]]:
    """Yield rows unchanged, and check that no `id` occurs twice.

    Raises:
      UserError: if an id occurs twice; the message names both rows.
    """
    seen: dict[str, str] = {}
    for where, row in rows:
        if row.get("id") is not None and (first := seen.setdefault(repr(row["id"]), where)) != where:
            raise UserError(
                f"{where}: its id {row['id']!r} is also that of {first}; ids must be unique (remove one of the rows)"
            )
        yield where, row


def _json(path: Path) -> Iterator[tuple[str, Json]]:
    opener = gzip.open if path.suffix == ".gz" else open
    # Only newlines end a line: universal newlines would split a row at a carriage return.
    with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        if ".json" in path.suffixes[-2:] and _first_character(file) == "[":
            for index, row in enumerate(_array(path, file.read())):
                yield f"{path}: row {index}", row
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                raise UserError(f"{path}:{number}: the line is empty")
            try:
                row = loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from None
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            yield f"{path}:{number}", row


def _array(path: Path, text: str) -> list[Json]:
    """Return the rows of a JSON list, and check their depth of nesting."""
    try:
        rows = json.loads(text)
    except RecursionError:
        raise UserError(f"{path}: a row is {too_deep()}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    for index, row in enumerate(rows):
        if deeper_than(row, MAX_DEPTH):
            raise UserError(f"{path}: row {index}: {too_deep()}")
    return rows


def _first_character(file) -> str:
    """Return the first character that is not whitespace, and rewind the file."""
    while (character := file.read(1)).isspace():
        pass
    file.seek(0)
    return character


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Json]]]:
    import pyarrow  # imported here, because it is slow to import
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(batch_size=100):  # rows with images may have megabytes
                for row in batch.to_pylist():
                    yield f"{path}: row {index}", row
                    index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())}") from None


def _choose(source: str, folder: Path, split: str, pattern: str = "*") -> list[Path]:
    inside = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.name.endswith(SUFFIXES)]
    inside = [path for path in inside if fnmatch.fnmatch(path.as_posix(), pattern)]
    if not inside:
        raise UserError(f"{source}: no data file in it (expected {', '.join(SUFFIXES)})")
    every_word = [word for words in SPLIT_WORDS.values() for word in words]
    # A pattern selects files explicitly, whatever their names.
    chosen = inside if pattern != "*" or not any(_named(inside, word) for word in every_word) else []
    chosen = next((named for word in SPLIT_WORDS[split] if (named := _named(inside, word))), chosen)
    if not chosen:
        names = ", ".join(path.as_posix() for path in inside[:8])
        raise UserError(f"{source}: no file is named for the {split} rows; it has {names}")
    return [folder / path for path in chosen]


def _named(paths: list[Path], word: str) -> list[Path]:
    """Return the paths that contain the word as a whole word."""
    return [path for path in paths if re.search(rf"(?<![a-z]){word}(?![a-z])", path.as_posix().lower())]


def _from_hub(source: str, split: str) -> list[Path]:
    import huggingface_hub

    match = _HUB.fullmatch(source)
    if not match:
        raise UserError(f"data {source!r}: expected hf:org/name, hf:org/name@revision or hf:org/name:pattern")
    repo, revision, pattern = match.groups()

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    repo, repo_type="dataset", revision=revision, allow_patterns=patterns
                )
            )
        except Exception as error:
            raise hub_failure(f"data {source!r}", error) from None

    if pattern:
        return _choose(source, fetch([pattern]), split, pattern)
    # First download only files named for the split, because other splits may be large; if there are none, download all.
    folder = fetch([f"*{word}*{suffix}" for word in SPLIT_WORDS[split] for suffix in SUFFIXES])
    try:
        return _choose(source, folder, split)
    except UserError:
        return _choose(source, fetch([f"*{suffix}" for suffix in SUFFIXES]), split)
