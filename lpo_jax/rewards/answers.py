"""Finding the answer in a text that a model wrote."""

import ast
import re
import warnings


def last_tagged(text: str, tag: str = "answer") -> str | None:
    """The content of the last `<tag>...</tag>` pair, stripped; None when there is no pair.

    It is the last opening tag that is closed, up to its first closing tag. So newlines inside and text after
    do no harm, a repeated opening tag (a template's prefill that the model wrote once more) is skipped, and
    only one answer counts however many were offered. Plain string searches: linear in the length of any text.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    if start < 0:
        return None
    start += len(opening)
    return text[start : text.find(closing, start)].strip()


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` whose braces match; None when there is none.

    The last is the one that opens last, so of boxes in boxes the innermost counts. A box that is never closed
    (the response was cut off in it) is none. One walk over the text, linear in its length.
    """
    opened: list[int | None] = []  # where the content of each open brace begins; None: no box
    found: tuple[int, int] | None = None
    for match in _BOX.finditer(text):
        token = match[0]
        if token == "{":
            opened.append(None)
        elif token.startswith(("\\boxed", "\\fbox")):
            opened.append(match.end())
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None and (found is None or start > found[0]):
                found = start, match.start()
    return None if found is None else text[found[0] : found[1]].strip()


def last_line_after(label: str, text: str) -> str | None:
    """What follows the last `label:` on its line, whatever the case of its letters; None when it is nowhere."""
    lines = re.findall(rf"{re.escape(label)}[ \t]*:([^\n]*)", text, re.IGNORECASE)
    return lines[-1].strip() if lines else None


_OPENING = re.compile(r"^([ \t]*)```(?:python3?|py)\b[^\n]*\n", re.M | re.I)
_FENCE = re.compile(r"^[ \t]*```", re.M)
# What can hold a quotation mark or a fence that means nothing, and a fence itself.
_LEXEME = re.compile(
    r"#[^\n]*|\"\"\"|'''|\"(?:\\.|[^\"\\\n])*+\"?|'(?:\\.|[^'\\\n])*+'?|^[ \t]*```", re.M | re.S
)
_CLOSINGS = {quotes: re.compile(rf"\\.|{quotes}", re.S) for quotes in ('"""', "'''")}
_MAX_LEXED = (
    4  # times the length of a text that is looked at for strings, because a string may never be closed
)


def last_program(text: str) -> str | None:
    """The last Python block of a text; None if there is none, or nothing in it.

    A block goes from a line ```` ```python ```` to the next line that begins with a fence, or to the end of the text.
    A fence in a string of several lines is part of the program if that is Python then. The indentation of the opening
    fence is taken off each line, as Markdown does. Linear in the length of the text.
    """
    program, at, left = None, 0, _MAX_LEXED * len(text)
    while opening := _OPENING.search(text, at):
        start = opening.end()
        at = _first_fence(text, start)
        if left > 0 and any(quotes in text[start:at] for quotes in _CLOSINGS):
            end = _fence_outside_strings(text, start)
            left -= (len(text) if end is None else end) - start
            if end is not None and end != at and _is_python(_unindented(text[start:end], opening[1])):
                at = end
        program = _unindented(text[start:at], opening[1])
    return program if program and program.strip() else None


def _first_fence(text: str, start: int) -> int:
    fence = _FENCE.search(text, start)
    return fence.start() if fence else len(text)


def _fence_outside_strings(text: str, at: int) -> int | None:
    """Where the first fence begins that is in no string, or the text ends; None if a string is never closed."""
    while lexeme := _LEXEME.search(text, at):
        at = lexeme.end()
        if lexeme[0] in _CLOSINGS:
            closings = _CLOSINGS[lexeme[0]].finditer(text, at)
            at = next((match.end() for match in closings if match[0] == lexeme[0]), -1)
            if at < 0:
                return None
        elif lexeme[0].endswith("```") and lexeme[0][0] not in "#\"'":
            return lexeme.start()
    return len(text)


def _unindented(program: str, indentation: str) -> str:
    return re.sub(rf"^[ \t]{{1,{len(indentation)}}}", "", program, flags=re.M) if indentation else program


def _is_python(program: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's escape sequences are not the trainer's concern
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
