"""The directory of one `lpo eval --suite`: its identity, responses and summary."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.files import LOCK, lock_directory, write_file
from lpo_jax.json_lines import dump_line, read_object
from lpo_jax.runs.directory import any_child, differences
from lpo_jax.sampling.model import Model
from lpo_jax.types import Json


def weights_hash(model: Model) -> str:
    """Return a SHA-256 over the shape and a sample of the values of every parameter, which identifies a checkpoint."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        values = np.asarray(leaf).reshape(-1)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
        digest.update(values[:: max(1, values.size // 4096)].tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def opened(directory: Path, identity: Mapping[str, Json]) -> Iterator[None]:
    """Create or continue the directory of one evaluation, locked against other processes.

    Args:
      directory: the directory.
      identity: JSON values that determine the responses. A directory with other values is another evaluation.

    Raises:
      UserError: the directory holds another evaluation or other files, another process uses it, or it cannot be
        written.
    """
    record = directory / "evaluation.json"
    if any_child(directory) and not record.exists() and {x.name for x in directory.iterdir()} != {LOCK}:
        raise UserError(f"{directory}: is not empty and holds no evaluation; set another --out")
    with lock_directory(directory, "evaluation"):
        (directory / "responses").mkdir(exist_ok=True)
        if any(path.stat().st_size for path in (directory / "responses").iterdir()):
            held = read_object(record, "set another --out, or remove the directory to start again")
            for key, was, now in differences("", held, identity):
                raise UserError(
                    f"{directory}: holds another evaluation, with {key[1:]} = {was!r} and not {now!r}; "
                    "set another --out, or use the same settings to continue it"
                )
        else:
            write_file(record, json.dumps(identity, indent=2) + "\n")
        yield


def responses_file(directory: Path, name: str) -> Path:
    """Return the path of a benchmark's responses."""
    return directory / "responses" / f"{name}.jsonl"


def write_summary(directory: Path, summary: Mapping[str, Json]) -> None:
    """Write summary.json.

    Raises:
      UserError: the file cannot be written.
    """
    text = json.dumps(json.loads(dump_line(summary)), indent=2, ensure_ascii=False)
    write_file(directory / "summary.json", text + "\n")
