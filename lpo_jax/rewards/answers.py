"""Finding the answer in a text that a model wrote."""

import re


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
