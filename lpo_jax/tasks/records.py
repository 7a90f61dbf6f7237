"""Where rows come from: files, folders and data sets of the Hugging Face hub; one dict a row.

A source is one string:

- a file: `.jsonl` (one JSON object a line), `.json` (a list of objects, or lines too), either of them `.gz`, or
  `.parquet`;
- a pattern of such files: `data/part-*.parquet`;
- a folder: those of its files whose path mentions the split wanted, or all where none mentions any split;
- `hf:org/name[@revision][:pattern]`: a data set on the hub, chosen from in the same way and kept in the hub's own
  cache, so that a second start needs no network.
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
from typing import Any

from lpo_jax.errors import UserError
from lpo_jax.hub import hub_failure
from lpo_jax.json_lines import MAX_DEPTH, deeper_than, loads, too_deep

SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")

# What files call the splits, in order of preference.
SPLIT_WORDS = {"train": ("train",), "heldout": ("heldout", "test", "validation", "valid", "val", "dev")}

_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::(.+))?")


def find_files(source: str, split: str) -> list[Path]:
    """The local files that a source stands for, downloaded if need be.

    Args:
      source: see the module.
      split: `"train"` or `"heldout"`; chooses among the files of a folder or a hub data set.

    Raises:
      UserError: if there is none, or the download failed.
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


def read_data_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(place, row)` for every row of a file, such as `("a.jsonl:7", {...})`, one after another.

    Raises:
      UserError: naming file and row, for what is empty, damaged or no row.
    """
    read = _parquet if path.suffix == ".parquet" else _json
    place = None
    try:
        for place, row in read(path):
            if not isinstance(row, dict):
                raise UserError(
                    f"{place}: a row is a JSON object with named fields, not {json.dumps(row)[:60]}"
                )
            yield place, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text after {place or 'its beginning'}: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if place is None:
        raise UserError(f"{path}: the file is empty")


def unique_ids(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same rows; an `id` that comes twice is an error.

    Raises:
      UserError: naming both rows.
    """
    seen: dict[str, str] = {}
    for place, row in rows:
        if row.get("id") is not None and (first := seen.setdefault(repr(row["id"]), place)) != place:
            raise UserError(
                f"{place}: its id {row['id']!r} is that of {first} too; ids must differ (drop one of the rows)"
            )
        yield place, row


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    # Lines end with newlines alone: a universal newline would part a row at a carriage return.
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


def _array(path: Path, text: str) -> list[Any]:
    """The rows of a JSON list, each within the depth that a row may have."""
    try:
        rows = json.loads(text)
    except RecursionError:
        raise UserError(f"{path}: it has a row that is {too_deep()}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    for index, row in enumerate(rows):
        if deeper_than(row, MAX_DEPTH):
            raise UserError(f"{path}: row {index}: {too_deep()}")
    return rows


def _first_character(file) -> str:
    """The first that is no whitespace; the file is then back at its start."""
    while (character := file.read(1)).isspace():
        pass
    file.seek(0)
    return character


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow  # here, for it is slow to import
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield f"{path}: row {index}", row
                    index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())}") from None


def _choose(source: str, folder: Path, split: str, pattern: str = "*") -> list[Path]:
    inside = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.name.endswith(SUFFIXES)]
    inside = [path for path in inside if fnmatch.fnmatch(path.as_posix(), pattern)]
    if not inside:
        raise UserError(f"{source}: no data file in it (looked for {', '.join(SUFFIXES)})")
    every_word = [word for words in SPLIT_WORDS.values() for word in words]
    # A pattern says which files are meant, whatever they are called.
    chosen = inside if pattern != "*" or not any(_named(inside, word) for word in every_word) else []
    chosen = next((named for word in SPLIT_WORDS[split] if (named := _named(inside, word))), chosen)
    if not chosen:
        names = ", ".join(path.as_posix() for path in inside[:8])
        raise UserError(f"{source}: no file is named for the {split} rows; it has {names}")
    return [folder / path for path in chosen]


def _named(paths: list[Path], word: str) -> list[Path]:
    """Those whose path has the word in it, as a word."""
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
    # First what the split may be called, for a training set can be large; then, if that is nothing, all.
    folder = fetch([f"*{word}*{suffix}" for word in SPLIT_WORDS[split] for suffix in SUFFIXES])
    try:
        return _choose(source, folder, split)
    except UserError:
        return _choose(source, fetch([f"*{suffix}" for suffix in SUFFIXES]), split)
