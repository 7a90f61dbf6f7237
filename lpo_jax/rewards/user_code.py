"""Load Python files that a user names in a config, such as a verifier or a dataset."""

import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from types import CodeType, ModuleType

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards.verdict import Verdict, Verifier, as_verdict, infrastructure
from lpo_jax.types import Json


def split_reference(reference: str) -> tuple[str, str] | None:
    """Split `"path/to/file.py:function"` into (absolute path, function); return None for any other text."""
    path, colon, function = reference.rpartition(":")
    if not colon or not path.endswith(".py"):
        return None
    return os.path.abspath(os.path.expanduser(path)), function


def file_hash(path: str) -> str:
    """Return the SHA-256 of a file's content in hexadecimal; empty if it cannot be read."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def load_module(path: str) -> ModuleType:
    """Import a Python file by its path.

    Its folder is appended to `sys.path`, so that the file can import its neighbours, but these shadow no other module.

    Raises:
      UserError: if the file is missing or its import fails; the message names the line that failed.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    folder, name = os.path.dirname(path), os.path.splitext(os.path.basename(path))[0]
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"lpo_user_{name}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_TextLoader(name, path))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {error_line(error, path)}") from error
    return module


class _TextLoader(importlib.machinery.SourceFileLoader):
    """Compiles the text of a file in any case.

    Python takes bytecode from its cache if a file has the same size, and was changed in the same second.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def error_line(error: BaseException, path: str) -> str:
    """Describe an error from a user's file in one line: its type, its text, and the line of the file."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    lines = [line for file, line in _frames(error) if file == path]
    return f"{text} (line {lines[-1]})" if lines else text


def innermost_frame(error: BaseException, path: str | None) -> str:
    """Return file and line of an error's innermost frame in the file `path`, or of its innermost frame overall."""
    frames = _frames(error)
    file, line = ([frame for frame in frames if frame[0] == path] or frames)[-1]
    return f"{file}, line {line}"


def _frames(error: BaseException) -> list[tuple[str, int]]:
    """Return (file, line) of each frame of an error, the innermost last."""
    return [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]


def find_function(module: ModuleType, name: str, path: str) -> Callable[..., object]:
    """Return the function `name` of a module.

    Args:
      module: the module of the file `path`.
      name: the function's name.
      path: the file, for error messages.

    Raises:
      UserError: if there is no such function, or it is not callable.
    """
    function = getattr(module, name, None)
    if callable(function):
        return function
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise UserError(f"{path}: the file has no function {name!r}{nearest(name, known)}")


def load_function(reference: str) -> Verifier:
    """Load a user's own verifier: a plain Python function `(response, example) -> float | Verdict` in a file.

    Args:
      reference: `"path/to/file.py:function"`.

    Returns:
      A function `(response, example) -> Verdict`. It propagates the exceptions of the user's function, and converts the
      return value to a verdict with a finite reward (see `as_verdict`).

    Raises:
      UserError: if the reference is malformed, the file or the function is missing, or the file cannot be imported.
    """
    parts = split_reference(reference)
    if parts is None:
        raise UserError(
            f"{reference!r} does not name a function in a file; write it as path/to/file.py:function"
        )
    path, name = parts
    function = find_function(load_module(path), name, path)

    defined = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_firstlineno", "?")

    @functools.wraps(function)
    def verify(response: str, example: Mapping[str, Json]) -> Verdict:
        returned = function(response, example)
        verdict = as_verdict(returned)
        if verdict.masked and not (isinstance(returned, Verdict) and returned.masked):
            return infrastructure(f"{verdict.parts['reason']} ({path}, line {defined})")
        return verdict

    return verify
