"""JSON lines: the only reader and the only writer of rows in files and pipes.

Only a newline ends a line. `str.splitlines` also splits at U+0085, U+2028 and U+2029, which are ordinary characters
inside a JSON string. The writer escapes these three, so that programs that use it can read our files; the reader does
not depend on the escapes.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from lpo_jax.errors import UserError
from lpo_jax.types import Json

MAX_DEPTH = 100  # nested lists and objects; code that handles rows recurses into them

_SEPARATORS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\u0085\u2028\u2029"})


def dump_line(row: Mapping[str, Json]) -> bytes:
    """Encode a row as one line of valid JSON, including the newline.

    Arrays become lists, numbers that are not finite become null, and values that JSON cannot represent become text.
    """
    text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False).translate(_SEPARATORS)
    # A lone surrogate (half a character, which a model can emit) is replaced by its JSON escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def print_line(row: Mapping[str, Json]) -> None:
    """Print a row as one line of valid JSON, in ASCII, because standard output may have any encoding."""
    print(json.dumps(_plain(row), allow_nan=False))


def loads(text: str | bytes) -> Json:
    """Parse a JSON text.

    Raises:
      ValueError: if it is not JSON, or is nested more than `MAX_DEPTH` deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep()) from None
    brackets = (
        text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    )
    if brackets > MAX_DEPTH and deeper_than(value, MAX_DEPTH):
        raise ValueError(too_deep())
    return value


def read_lines(
    path: str | os.PathLike,
    check: Callable[[Json], None] = lambda value: None,
    *,
    may_be_torn: bool = False,
    remedy: str = "repair or remove that line",
) -> Iterator[tuple[bytes, Json]]:
    """Yield (line, value) for each line of a file. Lines include their newline, which the last one may lack.

    Args:
      path: the file.
      check: called with each value; raises ValueError, KeyError or TypeError if the value is invalid.
      may_be_torn: whether to skip a damaged last line, which a process that is killed while writing can leave.
      remedy: the advice in the error message.

    Raises:
      UserError: if a line is damaged; the message names the file and the line.
      OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = loads(line)
                check(value)
            except (ValueError, KeyError, TypeError) as error:
                if may_be_torn and not file.read(1):
                    return
                raise UserError(f"{path} line {number} is damaged ({reason(error)}); {remedy}") from None
            yield line, value


def read_rows(path: str | os.PathLike, needs: Sequence[str] = (), **options: Json) -> list[dict[str, Json]]:
    """Read all rows of a file of JSON objects.

    Args:
      path: the file.
      needs: keys that every row must have.
      **options: see `read_lines`.

    Raises:
      UserError, OSError: see `read_lines`.
    """

    def check(row: Json) -> None:
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        for name in needs:
            row[name]

    return [row for _, row in read_lines(path, check, **options)]


def read_object(path: str | os.PathLike, remedy: str) -> dict[str, Json]:
    """Read a file that holds one JSON object.

    Args:
      path: the file.
      remedy: the advice in the error message.

    Raises:
      UserError: if the file cannot be read, or does not hold a JSON object.
    """
    try:
        with open(path, "rb") as file:
            value = loads(file.read())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); {remedy}") from None
    return value


def deeper_than(value: Json, limit: int) -> bool:
    """Return whether lists and mappings are nested more than `limit` deep, without recursion."""
    level = [value]
    for _ in range(limit):
        held = [x for x in level if isinstance(x, Mapping | list | tuple)]
        level = [item for x in held for item in (x.values() if isinstance(x, Mapping) else x)]
    return any(isinstance(x, Mapping | list | tuple) for x in level)


def lone_surrogate(value: Json) -> str | None:
    """Return a description, for error messages, of a lone surrogate anywhere in a value; None if there is none.

    JSON can contain half of a surrogate pair, but a tokenizer cannot encode it.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return f"half a character (the lone surrogate {error.object[error.start : error.end]!a})"
    return None


def too_deep() -> str:
    """Return a description, for error messages, of a value that is nested too deeply."""
    return f"nested more than {MAX_DEPTH} deep"


def reason(error: Exception) -> str:
    """Return the message of an error of `loads` or `check` on one line."""
    text = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
    return text or type(error).__name__


def _plain(value: Json) -> Json:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
