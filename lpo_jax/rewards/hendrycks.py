r"""Comparison of MATH answers as strings, as in Hendrycks et al. and verl, for comparison with published numbers.

The original is reproduced exactly, including its false negatives: `\frac{2}{4}` differs from `\frac{1}{2}`, and `1,000`
from `1000`; `x=5` equals 5, but `\alpha=5` does not.

References:
  Hendrycks et al., "Measuring Mathematical Problem Solving with the MATH Dataset" (2021), math_equivalence.py; verl,
  utils/reward_score/math_reward.py.
"""

import re


def boxed(text: str) -> str | None:
    r"""Return the content of the last box as verl finds it; None if it finds none.

    If `\boxed ` with a space occurs anywhere, the content is the text after its last occurrence, up to the next dollar
    sign. Otherwise it is that of the last `\boxed{...}`; if the braces of that one do not match, there is no box.
    """
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed")
    depth = 0
    for match in re.finditer("[{}]", text[start:] if start >= 0 else ""):
        depth += 1 if match[0] == "{" else -1
        if match[0] == "}" and depth == 0:
            box = text[start : start + match.end()]
            return box[len("\\boxed{") : -1] if box.startswith("\\boxed{") else None
    return None


def equal(answer: str, gold: str) -> bool:
    """Return whether two answers are equal after `strip`; if `strip` fails on one, whether they are identical."""
    try:
        return strip(answer) == strip(gold)
    except (ValueError, IndexError):
        return answer == gold


def strip(text: str) -> str:
    r"""Normalise LaTeX that has several spellings, and remove units that follow `\text{ `.

    Raises:
      ValueError, IndexError: for malformed commands, on which the original fails too.
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for ignored in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(ignored, "")
    if "\\text{ " in text:  # in MATH it always begins a unit
        text, _ = text.split("\\text{ ")
    text = text.replace("\\\\%", "").replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _fractions(_roots(text).replace(" ", ""))
    return _slash("\\frac{1}{2}" if text == "0.5" else text)


def _roots(text: str) -> str:
    """Write sqrt3 as sqrt{3}."""
    first, *rest = text.split("\\sqrt")
    return first + "".join(
        "\\sqrt" + (part if part[0] == "{" else "{" + part[0] + "}" + part[1:]) for part in rest
    )


def _fractions(text: str) -> str:
    """Write frac12 as frac{1}{2}, and frac1{72} as frac{1}{72}."""
    result, *rest = text.split("\\frac")
    for part in rest:
        if part[0] == "{":
            result += "\\frac" + part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            result += "\\frac{" + part[0] + "}" + part[1:]
        else:
            result += "\\frac{" + part[0] + "}{" + part[1] + "}" + part[2:]
    return result


def _slash(text: str) -> str:
    """Write 3/4 as frac{3}{4}, if both are integers as Python prints them."""
    sides = text.split("/")
    try:
        top, bottom = map(int, sides)
    except ValueError:
        return text
    return f"\\frac{{{top}}}{{{bottom}}}" if text == f"{top}/{bottom}" else text
