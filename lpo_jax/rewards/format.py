"""The verifier for the format of a response: it checks the tags, not their content."""

import re
from collections.abc import Mapping, Sequence

from lpo_jax.errors import UserError
from lpo_jax.rewards.verdict import Verdict, Verifier, VerifierDescriptor
from lpo_jax.types import Json


def format_verifier(*, tags: Sequence[str] = ("think", "answer")) -> Verifier:
    """Build the format verifier: `<think>...</think><answer>...</answer>` and nothing else except whitespace.

    Each tag must occur exactly once, in order, and enclose some text, so that an empty response earns no reward. If the
    template already opens the first tag, `get("format", prefill="<think>")` prepends that text to the response.

    Args:
      tags: the names of the tags, in order.

    Returns:
      A function `(response, example) -> Verdict` with reward 1 or 0.

    Raises:
      UserError: if a tag is not a word or occurs twice.
    """
    words = isinstance(tags, list | tuple) and all(re.fullmatch(r"[A-Za-z][\w-]*", str(tag)) for tag in tags)
    if not words or not tags or len(set(tags)) < len(tags):
        raise UserError(f"format: tags {tags!r}: need a list of different words, such as [think, answer]")

    def verify(response: str, example: Mapping[str, Json]) -> Verdict:
        at = 0
        for tag in tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if response.count(opening) != 1 or response.count(closing) != 1:
                return _malformed(f"needs exactly one {opening} and one {closing}")
            start, end = response.find(opening), response.find(closing)
            # `start` is less than `at` if a tag opens before the previous one is closed.
            if start < at or response[at:start].strip():
                return _malformed(f"something before {opening} that does not belong there")
            if not response[start + len(opening) : end].strip():
                return _malformed(f"nothing between {opening} and {closing}")
            at = end + len(closing)
        if response[at:].strip():
            return _malformed(f"text after </{tags[-1]}>")
        return Verdict(1.0, "pass")

    return verify


DESCRIPTOR = VerifierDescriptor("format", format_verifier)


def _malformed(reason: str) -> Verdict:
    return Verdict(0.0, "malformed", {"reason": reason})
