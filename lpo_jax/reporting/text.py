"""Small pieces of text for terminals: safe model output, durations, numbers."""

import math
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


def console(**options) -> Console:
    """The terminal, or, where output goes to a file or a pipe, a plain one wide enough for our tables."""
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
