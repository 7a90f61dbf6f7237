"""JSON lines: the one reader and the one writer of rows in files and pipes.

A line ends with a newline and with nothing else. `str.splitlines` splits at U+0085, U+2028 and U+2029 too, which are
ordinary characters inside a JSON string. The writer escapes these three, so that other programs cannot make that
mistake with our files; the reader does not depend on it.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError

MAX_DEPTH = 100  # of nested lists and objects; what handles rows recurses into them

_SEPARATORS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\u0085\u2028\u2029"})


def dump_line(row: Mapping[str, Any]) -> bytes:
    """A row as one line of valid JSON, its newline included.

    Arrays become lists, numbers that are not finite null, and what JSON has no value for its text.
    """
    text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False).translate(_SEPARATORS)
    # A lone surrogate (half a character, which a model can emit) becomes its JSON escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def print_line(row: Mapping[str, Any]) -> None:
    """Prints a row as one line of valid JSON, in ASCII, since standard output may have any encoding."""
    print(json.dumps(_plain(row), allow_nan=False))


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is not JSON, or nested more than `MAX_DEPTH` deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep()) from None
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) > MAX_DEPTH and deeper_than(value, MAX_DEPTH):
        raise ValueError(too_deep())
    return value


def read_lines(
    path: str | os.PathLike,
    check: Callable[[Any], None] = lambda value: None,
    *,
    may_be_torn: bool = False,
    remedy: str = "repair or remove that line",
) -> Iterator[tuple[bytes, Any]]:
    """(line, value) pairs of a file, one after another; a line includes its newline, which the last one may lack.

    Args:
      check: called with each value in turn; raises ValueError, KeyError or TypeError where it does not belong there.
      may_be_torn: whether the last line may be damaged, as a kill in the middle of a write leaves it. It is left out.
      remedy: what the error message advises.

    Raises:
      UserError: naming the file and the damaged line.
      OSError: the file cannot be read.
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


def read_rows(path: str | os.PathLike, needs: Sequence[str] = (), **options: Any) -> list[dict[str, Any]]:
    """All rows of a file of JSON objects.

    Args:
      needs: names that every row has.

    Further options and errors are those of `read_lines`.
    """

    def check(row: Any) -> None:
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        for name in needs:
            row[name]

    return [row for _, row in read_lines(path, check, **options)]


def read_object(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
      remedy: what the error message advises.

    Raises:
      UserError: the file cannot be read or holds something else.
    """
    try:
        with open(path, "rb") as file:
            value = loads(file.read())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); {remedy}") from None
    return value


def deeper_than(value: Any, limit: int) -> bool:
    """Whether lists and mappings are nested more than `limit` deep; does not recurse, so that depth does no harm."""
    level = [value]
    for _ in range(limit):
        held = [x for x in level if isinstance(x, Mapping | list | tuple)]
        level = [item for x in held for item in (x.values() if isinstance(x, Mapping) else x)]
    return any(isinstance(x, Mapping | list | tuple) for x in level)


def lone_surrogate(value: Any) -> str | None:
    """What an error message says of half a character anywhere in a value; None where there is none.

    JSON can hold half of a surrogate pair, and a tokenizer cannot take one.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return f"half a character (the lone surrogate {error.object[error.start : error.end]!a})"
    return None


def too_deep() -> str:
    """What an error message says of such a value."""
    return f"nested more than {MAX_DEPTH} deep"


def reason(error: Exception) -> str:
    """An error of `loads` or `check` in a few words on one line."""
    text = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
    return text or type(error).__name__


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
