r"""The geometry verifier: the mathematics verifier, and the form that Geometry3k's prompt requires.

A response is well-formed if it begins with `<think>`, and `</think>` is followed by a `\boxed{...}`; text may follow.
The answer is the last box, whether the response is well-formed or not, and is compared with the gold answer as in
`math.py`. A last box that is empty or not closed is no answer and earns nothing, although verl rewards the form.

| answer | well-formed | paper | verl |
| --- | --- | --- | --- |
| right | yes | 1 | 1 |
| right | no | 1 | 0.9 |
| wrong | yes | 0.1 | 0.1 |
| wrong or missing | no | 0 | 0 |

References:
  LPO, "Experiments" (the rewards "paper"); verl, utils/reward_score/geo3k.py ("verl": 0.9 for the answer plus 0.1 for
  the form).
"""

import dataclasses
from collections.abc import Mapping

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards import math
from lpo_jax.rewards.verdict import Verdict, Verifier
from lpo_jax.types import Json

# (right, well-formed) -> reward
REWARDS = {
    "paper": {(True, True): 1.0, (True, False): 1.0, (False, True): 0.1, (False, False): 0.0},
    "verl": {(True, True): 1.0, (True, False): 0.9, (False, True): 0.1, (False, False): 0.0},
}


def geometry_verifier(*, rewards: str = "paper") -> Verifier:
    """Build the geometry verifier. Examples have `answer`, LaTeX or a number.

    Args:
      rewards: "paper" or "verl"; see the module's docstring.

    Returns:
      A function `(response, example) -> Verdict`. A wrong answer in a response that is not well-formed is `malformed`;
      other outcomes are those of `math.math_verifier`. A comparison that runs out of time counts as a wrong answer.

    Raises:
      UserError: if `rewards` is neither.
    """
    if rewards not in REWARDS:
        raise UserError(
            f"geometry: unknown rewards {rewards!r}{nearest(rewards, REWARDS)}; known: {', '.join(REWARDS)}"
        )
    judge = math.math_verifier()

    def verify(response: str, example: Mapping[str, Json]) -> Verdict:
        verdict = judge(response, example)
        if verdict.masked:
            return verdict
        right = verdict.outcome == "pass"
        formed = verdict.outcome != "malformed" and well_formed(response)
        reward = REWARDS[rewards][right, formed]
        if verdict.outcome == "wrong" and not formed:
            reason = "the answer is wrong, and the response is not <think>...</think> with a box after it"
            return Verdict(reward, "malformed", {**verdict.parts, "reason": reason})
        return dataclasses.replace(verdict, reward=reward)

    return verify


DESCRIPTOR = dataclasses.replace(math.DESCRIPTOR, name="geometry", build=geometry_verifier)


def well_formed(response: str) -> bool:
    r"""Return whether a response is `<think>...</think>` with a `\boxed{...}` after it."""
    text = response.lstrip()
    thought = text.find("</think>")
    box = text.find("\\boxed{", thought)
    return text.startswith("<think>") and thought > 0 and box > 0 and "}" in text[box:]
