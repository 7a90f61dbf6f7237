"""Finding the answer in a text that a model wrote."""


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
