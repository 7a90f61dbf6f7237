"""The verifier for questions whose answer is one integer."""

import re
from collections.abc import Mapping, Sequence

from lpo_jax.rewards.answers import last_tagged
from lpo_jax.rewards.countdown import three_scores
from lpo_jax.rewards.verdict import Verdict, Verifier, VerifierDescriptor
from lpo_jax.types import Json

MAX_CHARS = 1000  # Python does not convert integers of more than 4,300 digits

_INTEGER = re.compile(r"[+-]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)")
# A number in running text. It is never the end of a word or of another number, so the last number of 12-5 is 5, and
# 19.5 is one number. Fractions, powers and numbers with an exponent are matched whole, because they are not integers.
_NUMBER = re.compile(
    r"(?<![\w.])[+-]?[0-9][0-9,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+|\s*[/\u2044^]\s*[0-9]+|[^\W0-9a-zA-Z_]+)?"
)


def arithmetic_verifier(*, scores: Sequence[float] = (1.0, 0.0, 0.0)) -> Verifier:
    """Build the integer verifier. Examples have `answer`, an integer or its text.

    The answer is the content of the last `<answer>...</answer>` pair. It must be an integer and nothing else; commas
    may separate thousands. A response without any `<answer>` tag is judged by its last number.

    Args:
      scores: rewards for a correct integer, a wrong integer, and no integer.

    Returns:
      A function `(response, example) -> Verdict`.

    Raises:
      UserError: if `scores` is not three finite numbers.
    """
    correct, wrong, malformed = three_scores("arithmetic", scores)

    def verify(response: str, example: Mapping[str, Json]) -> Verdict:
        expected = int(str(example["answer"]).replace(",", ""))
        answer = last_tagged(response)
        if answer is None:
            if "<answer>" in response:
                return Verdict(malformed, "malformed", {"reason": "<answer> is never closed"})
            answer = next((found[0].rstrip(",") for found in reversed([*_NUMBER.finditer(response)])), "")
        parts: dict[str, float | str] = {"answer": answer[:200]}
        if len(answer) > MAX_CHARS or not _INTEGER.fullmatch(answer):
            return Verdict(malformed, "malformed", parts | {"reason": "no integer"})
        if int(answer.replace(",", "")) != expected:
            return Verdict(wrong, "wrong", parts)
        return Verdict(correct, "pass", parts)

    return verify


DESCRIPTOR = VerifierDescriptor("arithmetic", arithmetic_verifier, fields=("answer",))
