"""Small pieces of text for terminals: safe model output, durations, numbers."""

import contextlib
import math
import os
import sys
import unicodedata

from rich.console import Console

_HIDDEN = {
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Zl",
    "Zp",
}  # control, format, surrogate, private, line and paragraph marks


def sanitise(text: str) -> str:
    """`text` with every character that could move the cursor, recolour the terminal or reverse the reading
    order written out as an escape (`\\x1b`, `\\u202e`). Line breaks stay, a tab becomes four spaces.

    It says nothing about rich markup: print the result as `rich.text.Text` or with `markup=False`.
    """
    return "".join(_visible(char) for char in text.replace("\t", "    "))


def _visible(char: str) -> str:
    if char == "\n" or unicodedata.category(char) not in _HIDDEN:
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _Output:
    """Standard output that goes quiet once nobody can read it, so that a lost terminal or `| head` ends no run."""

    def __init__(self):
        self._file = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - lives as long as the console

    def write(self, text: str) -> int:
        with self._until_gone():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._until_gone():
            self._file.flush()

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    @contextlib.contextmanager
    def _until_gone(self):
        try:
            yield
        except OSError as error:
            nothing = os.open(os.devnull, os.O_WRONLY)
            with contextlib.suppress(
                OSError, ValueError
            ):  # what stands in for standard output may have no number
                os.dup2(nothing, self._file.fileno())
            os.close(nothing)
            with contextlib.suppress(OSError):  # standard error may be gone as well
                print(
                    f"lpo: standard output is gone ({error.strerror}); files are still written",
                    file=sys.stderr,
                )


def console(**options) -> Console:
    """The terminal, or, where output goes to a file or a pipe, a plain one wide enough for our tables.

    Where it can no longer be written to, what is printed is dropped.
    """
    if "file" not in options:
        options = {**options, "file": _Output()}
    terminal = Console(**options)
    if not terminal.is_terminal and "width" not in options:
        terminal = Console(**options, width=max(terminal.width, 110))
    return terminal


def duration(seconds: float) -> str:
    """`42s`, `3m 05s`, `2h 07m` or `3d 04h`; `?` for what is not known."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d {seconds % 86400 // 3600:02d}h"


def percent(share: float) -> str:
    """A share as `13.5%`; `n/a` where there is none."""
    return "n/a" if share is None or not math.isfinite(share) else f"{100 * share:.1f}%"
