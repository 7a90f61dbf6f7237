"""Text for terminals: escaped model output, durations, percentages, and the console."""

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
}  # Unicode categories: control, format, surrogate, private use, line and paragraph separators


def sanitise(text: str) -> str:
    """Escape every character that could move the cursor, change colours or reverse the reading order.

    Such characters become escapes such as `\\x1b` and `\\u202e`. Line breaks are kept; a tab becomes four spaces.
    Rich markup is not escaped: print the result as `rich.text.Text` or with `markup=False`.
    """
    text = text.replace("\t", "    ")
    if text.replace(
        "\n", ""
    ).isprintable():  # most texts, and much faster than the category of each character
        return text
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    if char == "\n" or unicodedata.category(char) not in _HIDDEN:
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _Output:
    """Standard output that drops text once it is closed, so that a lost terminal or `| head` does not end a run."""

    def __init__(self):
        self._file = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - open as long as the console

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
            ):  # a replaced standard output may have no file descriptor
                os.dup2(nothing, self._file.fileno())
            os.close(nothing)
            with contextlib.suppress(OSError):  # standard error may be closed as well
                print(
                    f"lpo: standard output is gone ({error.strerror}); files are still written",
                    file=sys.stderr,
                )


def console(**options) -> Console:
    """Return a rich console on standard output; if that is not a terminal, a plain one at least 110 columns wide.

    Output is dropped once standard output is closed.

    Args:
        options: keyword arguments of `rich.console.Console`.
    """
    if "file" not in options:
        options = {**options, "file": _Output()}
    terminal = Console(**options)
    if not terminal.is_terminal and "width" not in options:
        terminal = Console(**options, width=max(terminal.width, 110))
    return terminal


def duration(seconds: float) -> str:
    """Format a time as `42s`, `3m 05s`, `2h 07m` or `3d 04h`; `?` if it is not finite."""
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


def percent(fraction: float | None) -> str:
    """Format a fraction as `13.5%`; `n/a` if it is None or not finite."""
    return "n/a" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.1f}%"
