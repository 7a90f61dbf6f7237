"""Find the final answer in the text of a response."""

import ast
import re
import warnings


def last_tagged(text: str, tag: str = "answer") -> str | None:
    """Return the content of the last `<tag>...</tag>` pair, stripped; None if there is no pair.

    The pair consists of the last opening tag that is closed and the first closing tag after it. So the content may have
    newlines, text may follow the pair, a repeated opening tag (the template's prefill, which the model wrote again) is
    skipped, and only one answer counts if there are several. The time is linear in the length of the text.
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
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}` whose braces match; None if there is none.

    The last box is the one that opens last, so the innermost of nested boxes counts. A box that is never closed,
    because the response was cut off, does not count. The time is linear in the length of the text.
    """
    # For each open brace, where the content of its box begins; None for other braces.
    opened: list[int | None] = []
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
    """Return the rest of the line after the last `label:`, ignoring case; None if the label does not occur."""
    lines = re.findall(rf"{re.escape(label)}[ \t]*:([^\n]*)", text, re.IGNORECASE)
    return lines[-1].strip() if lines else None


_OPENING = re.compile(r"^([ \t]*)```(?:python3?|py)\b[^\n]*\n", re.M | re.I)
_FENCE = re.compile(r"^[ \t]*```", re.M)
# Comments and strings, in which quotation marks and fences have no meaning; and a fence itself.
_STRING = r"\"\"\"|'''|\"(?:\\.|[^\"\\\n])*+\"?|'(?:\\.|[^'\\\n])*+'?"
_LEXEME = re.compile(rf"#[^\n]*|{_STRING}|^[ \t]*```", re.M | re.S)
_CLOSINGS = {quotes: re.compile(rf"\\.|{quotes}", re.S) for quotes in ('"""', "'''")}
# The search for strings may read at most this many times the length of the text, because a string may never be closed.
_MAX_LEXED = 4


def last_program(text: str) -> str | None:
    """Return the last Python block of a text; None if there is none, or if it is empty.

    A block extends from a line ```` ```python ```` to the next line that begins with a fence, or to the end of the
    text. A fence inside a multi-line string belongs to the program, provided that the program is then valid Python. The
    indentation of the opening fence is removed from each line, as Markdown does. The time is linear in the length of
    the text.
    """
    program, at, left = None, 0, _MAX_LEXED * len(text)
    while opening := _OPENING.search(text, at):
        start = opening.end()
        fence = _FENCE.search(text, start)
        at = fence.start() if fence else len(text)
        if left > 0 and any(quotes in text[start:at] for quotes in _CLOSINGS):
            end = _fence_outside_strings(text, start)
            left -= (len(text) if end is None else end) - start
            if end is not None and end != at and _is_python(_unindented(text[start:end], opening[1])):
                at = end
        program = _unindented(text[start:at], opening[1])
    return program if program and program.strip() else None


def _fence_outside_strings(text: str, at: int) -> int | None:
    """Return where the first fence outside strings begins, or the text ends; None if a string is never closed."""
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
            warnings.simplefilter("ignore")  # about escape sequences in a model's program
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
