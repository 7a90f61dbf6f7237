r"""The structure of answers: lists, tuples, intervals, unions, matrices, equations, and scalars at the leaves.

`read_answer` parses answers without evaluating anything. `same_answer` compares the structure of two answers and leaves
the scalars to a function. So a list is never compared as one expression, where `n=2,3,4` might pass for `n=1,2,3`.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

from lpo_jax.rewards import rational
from lpo_jax.rewards.latex import MAX_DEPTH, Unreadable, canonical

MAX_CHARS = 2000
MAX_ITEMS = 100
MAX_WORDS = 6  # a text with more words is prose

_OPEN, _CLOSE = ("(", "[", r"\{"), (")", "]", r"\}")
_TOKEN = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")
_GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_MATRIX = re.compile(r"\\begin\{([pb]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_WHOLE_TEXT = re.compile(r"\\(?:text|mbox|textbf|textrm|textit|mathrm)\s*\{([^{}]*)\}")
_DEGREE = r"\^\{\\circ\}"
_UNIT = r"%|\^\{\\text\{(?:st|nd|rd|th)\}\}|(?:/|\\cdot)?\\text\{[^{}]*\}(?:\^\{-?[0-9]\})?"
_UNITS = re.compile(rf"(?:{_DEGREE}|{_UNIT})+$")
_UNITS_OF_FUNCTION = re.compile(rf"(?:{_UNIT})+$")  # \cos 15^\circ is not the value \cos 15 in degrees
_LETTER = r"(?:[A-Za-z]|\\(?!frac|sqrt|sin|cos|tan|log|ln|text|pi\b)[a-z]+)"
_SCRIPTS = r"(?:_\{[^{}]*(?:\{[^{}]*\})?[^{}]*\}|'|\^\{(?:'+|-1)\})*"
# Left sides of = that only name the value.
_SYMBOL = rf"{_LETTER} ?{_SCRIPTS}"
_NAME = re.compile(
    rf" ?(?:{_SYMBOL}(?:\([^()]*\))?"  # x, f(x)
    rf"|\({_SYMBOL}(?:,{_SYMBOL})+\)"  # (a,b)
    r"|(?:m?\\angle ?|\\overline)\{?[A-Z_{}0-9]+\}?|[A-Z]{2,3}"  # \angle ABC, \overline{AB}, AB
    r"|\\text\{[^{}]*\})"
)
_INTERVALS = ("()", "(]", "[)", "[]")
_WITHOUT_POINTS = re.compile(r"\\mathbb\{R\}(?:\\setminus|-) ?\\\{(.*)\\\}")
_COMPARISONS = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">="}


@dataclasses.dataclass(frozen=True)
class Value:
    """A node of a parsed answer.

    Attributes:
      kind: "scalar", "word", "equation" (its parts are the sides), "list" and "set" (in any order), "union", "matrix",
        "row", or a pair of brackets such as "()" or "[)".
      text: the canonical LaTeX of a scalar; the lower-case text of a word; the original text of any other node.
      parts: the child nodes.
      name: the name of the value, as in `x = 5` or `x \\in (0, 1)`; empty if it has none.
      unit: the unit after a scalar (`%`, degrees, or a text).
    """

    kind: str
    text: str
    parts: tuple["Value", ...] = ()
    name: str = ""
    unit: str = ""


Equal = Callable[[Value, Value], bool]  # whether a gold scalar or equation equals that of an answer


def read_answer(text: str) -> tuple[Value, ...]:
    """Parse an answer.

    Returns:
      The possible readings: one, or two if a comma may separate either thousands or items (`1,234`).

    Raises:
      Unreadable: if the text is empty, too long, prose, or not well-formed.
    """
    text = text.strip()
    if len(text) > MAX_CHARS:
        raise Unreadable(f"longer than {MAX_CHARS} characters")
    if text.startswith("**") and text.endswith("**"):
        text = text.strip("*")
    if whole := _WHOLE_TEXT.fullmatch(text.rstrip("., ")):
        text = whole[1]
    if len(_WORD.findall(_COMMAND.sub(" ", text))) > MAX_WORDS:
        raise Unreadable("prose")
    text = _strip(canonical(text)).removeprefix(r"\approx").strip()
    if not text:
        raise Unreadable("empty")
    if r"\begin{" in text and "matrix}" not in text:
        return (Value("scalar", text),)  # cases and arrays are compared as text
    readings = [text]
    if _GROUPED.search(text):
        readings.append(_GROUPED.sub(lambda match: match[0].replace(",", ""), text))
    return tuple(_list(reading) for reading in readings)


def _strip(text: str) -> str:
    return text.strip().rstrip(".,;").strip()


def _split(text: str, separators: tuple[str, ...]) -> list[tuple[str, str]]:
    """Split a text at separators outside brackets; return pairs of the separator before each part, and the part.

    Raises:
      Unreadable: if brackets are unbalanced or nested too deeply.
    """
    parts, start, depth, before = [], 0, 0, ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPEN or token == "{":
            depth += 1
        elif token in _CLOSE or token == "}":
            depth -= 1
        elif depth == 0 and token in separators:
            parts.append((before, text[start : match.start()]))
            start, before = match.end(), token
        if depth < 0:
            raise Unreadable("a closing bracket without its opening one")
        if depth > MAX_DEPTH:
            raise Unreadable(f"nested deeper than {MAX_DEPTH} levels")
    if depth:
        raise Unreadable("a bracket is not closed")
    return [*parts, (before, text[start:])]


def _list(text: str) -> Value:
    found = [(before, _strip(part)) for before, part in _split(text, (",", ";", r"\lor"))]
    parts = [part for _, part in found if part]
    if not parts or len(parts) > MAX_ITEMS:
        raise Unreadable("empty" if not parts else f"more than {MAX_ITEMS} items")
    if len(parts) == 1:
        return _item(parts[0])
    items = [_item(part) for part in parts]
    names = {item.name for item in items}
    if {before for before, _ in found[1:]} == {r"\lor"} and _are_intervals(items) and len(names) == 1:
        return Value("union", text, tuple(items), name=names.pop())  # x < 1 or x > 2
    if items[0].name and not any(item.name for item in items[1:]):  # n = 2, 3, 4
        items = [dataclasses.replace(item, name=items[0].name) for item in items]
    return _flat(text, items)


def _are_intervals(items: Sequence[Value]) -> bool:
    """Return whether all items are intervals, of which one is certainly no point: it has a name or no end."""
    if not all(item.kind in _INTERVALS and len(item.parts) == 2 for item in items):
        return False
    return any(
        item.name or item.kind in ("(]", "[)") or any(r"\infty" in end.text for end in item.parts)
        for item in items
    )


def _flat(text: str, items: list[Value], kind: str = "list") -> Value:
    """Build a list or set in which the two values of a plus-minus are separate items."""
    flat = []
    for item in items:
        inner = item.parts if item.kind == "list" else (item,)  # a set in a list is one item
        flat += [dataclasses.replace(part, name=part.name or item.name) for part in inner]
    return Value(kind, text, tuple(flat))


def _item(text: str) -> Value:
    if not text:
        raise Unreadable("an item is missing")
    sides = _split(text, ("=", r"\in", r"\approx"))
    if len(sides) > 1:
        return _sides(text, sides)
    sides = _split(text, (r"\cup",))
    if len(sides) > 1:
        return Value("union", text, tuple(_item(_strip(side)) for _, side in sides))
    sides = _split(text, tuple(_COMPARISONS))
    if len(sides) > 1:
        return _inequality(text, sides)
    return _reals(text) or _group(text) or _plus_minus(text) or _scalar(text)


def _reals(text: str) -> Value | None:
    """Parse the set of all real numbers, or all except some, as intervals; return None for anything else."""
    written, name = [], ""
    if match := _WITHOUT_POINTS.fullmatch(text):
        written = [_strip(part) for _, part in _split(match[1], (",", ";"))]
    elif len(sides := _split(text, (r"\ne",))) == 2 and _NAME.fullmatch(name := _strip(sides[0][1])):
        written = [_strip(sides[1][1])]  # x \ne 1
    elif text != r"\mathbb{R}":
        return None
    if not all(written):
        return None
    points = [_item(point) for point in written]
    if any(point.kind != "scalar" or point.name for point in points):
        return None
    if len(points) > 1:  # the order of the points must be known
        try:
            values = [rational.value(point.text) for point in points]
        except rational.TooLarge:
            return None
        if None in values or len(set(values)) < len(values):
            return None
        points = [point for _, point in sorted(zip(values, points), key=lambda pair: pair[0])]
    ends = [Value("scalar", r"-\infty"), *points, Value("scalar", r"\infty")]
    intervals = tuple(Value("()", text, pair) for pair in itertools.pairwise(ends))
    return Value("union", text, intervals, name) if points else intervals[0]


def _sides(text: str, sides: list[tuple[str, str]]) -> Value:
    parts = [_strip(side) for _, side in sides]
    if sides[-1][0] == r"\approx":  # 20000/pi = ... ~ 6366.2: use the exact value
        return _item(text[: text.rindex(r"\approx")])
    name = parts.pop(0) if _NAME.fullmatch(parts[0]) else ""
    if len(parts) == 1:
        return dataclasses.replace(_item(parts[0]), name=name)
    return Value("equation", text, tuple(_item(part) for part in parts), name=name)


def _inequality(text: str, sides: list[tuple[str, str]]) -> Value:
    """Parse `2 < x \\le 3` as the interval `(2,3]` with the name x; other inequalities are compared as text."""
    operands, signs = [_strip(side) for _, side in sides], [_COMPARISONS[sign] for sign, _ in sides[1:]]
    if len({sign[0] for sign in signs}) == 1 and len(operands) in (2, 3):
        if signs[0][0] == ">":  # 3 >= x > 2
            operands.reverse()
            signs = [sign.replace(">", "<") for sign in reversed(signs)]
        if len(operands) == 2 and _NAME.fullmatch(operands[0]):
            operands, signs = [r"-\infty", *operands], ["<", *signs]
        elif len(operands) == 2 and _NAME.fullmatch(operands[1]):
            operands, signs = [*operands, r"\infty"], [*signs, "<"]
        if len(operands) == 3 and _NAME.fullmatch(operands[1]):
            kind = ("[" if signs[0] == "<=" else "(") + ("]" if signs[1] == "<=" else ")")
            return Value(kind, text, (_item(operands[0]), _item(operands[2])), name=operands[1])
    return Value("word", text)


def _group(text: str) -> Value | None:
    """Parse a tuple, an interval, a set or a matrix; return None for anything else."""
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for _, row in _split(matrix[2], ("\\\\",)) if row.strip()]
        cells = [[_item(_strip(cell)) for _, cell in _split(row, ("&",))] for row in rows]
        return Value("matrix", text, tuple(Value("row", "", tuple(row)) for row in cells))
    tokens = _TOKEN.findall(text)
    if tokens == [r"\{", r"\}"]:
        return Value("set", text)
    opening, closing = tokens[0], tokens[-1]
    if opening not in _OPEN or closing not in _CLOSE or len(tokens) < 3 or not _encloses(tokens):
        return None
    inside = text[len(opening) : len(text) - len(closing)]
    parts = [_strip(part) for _, part in _split(inside, (",", ";", r"\lor"))]
    if opening == r"\{" and closing == r"\}":
        items = [_item(part) for part in parts if part]
        single = len(items) == 1 and items[0].kind != "set"  # {5} is 5, but {{}} is not {}
        return items[0] if single else _flat(text, items, kind="set")
    if len(parts) == 1:  # parentheses around a single item have no meaning
        return _item(parts[0])
    return Value(opening + closing, text, tuple(_item(part) for part in parts))


def _encloses(tokens: list[str]) -> bool:
    """Return whether the last bracket closes the first."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _plus_minus(text: str) -> Value | None:
    if r"\pm" not in text and r"\mp" not in text:
        return None
    signs = (("+", "-"), ("-", "+"))
    return _flat(text, [_item(text.replace(r"\pm", up).replace(r"\mp", down)) for up, down in signs])


def _scalar(text: str) -> Value:
    pattern = _UNITS_OF_FUNCTION if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text) else _UNITS
    unit = match[0] if (match := pattern.search(text)) and match.start() else ""
    text = text.removesuffix(unit).strip().removeprefix("+")
    while text.startswith("{") and _closes_at_end(text):
        text = text[1:-1].strip()
    if not text:
        raise Unreadable("empty")
    if text == r"\emptyset":
        return Value("set", text)
    letters = text.removeprefix(r"\text{").removesuffix("}")
    if re.fullmatch(r"[A-Za-z][A-Za-z .']{2,}|[Nn]o", letters) or text.startswith(r"\text{"):
        return Value("word", letters.replace(" ", "").lower())
    return Value("scalar", text, unit=unit)


def _closes_at_end(text: str) -> bool:
    depth = 0
    for index, match in enumerate(matches := list(_TOKEN.finditer(text))):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return index == len(matches) - 1
    return False


def same_answer(gold: Value, answer: Value, equal: Equal) -> bool:
    """Return whether two parsed answers are the same.

    Args:
      gold: the right answer.
      answer: the answer to judge.
      equal: compares two scalars or two equations.
    """
    if gold.name and answer.name and gold.name != answer.name:
        return False
    kinds = {gold.kind, answer.kind}
    if kinds == {"matrix", "()"}:
        return _same_vector(gold, answer, equal)
    if kinds == {"list", "union"}:  # x < 1, x > 2
        written_as_list, union = (gold, answer) if gold.kind == "list" else (answer, gold)
        if r"\lor" not in union.text or not _are_intervals(written_as_list.parts):
            return False
        return len(gold.parts) == len(answer.parts) and _any_order(gold.parts, answer.parts, equal)
    if kinds == {"set"} and len(answer.parts) > len(gold.parts):
        return _same_with_repeats(gold.parts, answer.parts, equal)
    unordered = kinds <= {"list", "set"} or kinds == {"union"}
    if len(kinds) > 1 and not unordered:
        return _one_is_an_equation(gold, answer, equal)
    if gold.kind == "scalar":
        return equal(gold, answer)
    if gold.kind == "word":
        return gold.text == answer.text
    if gold.kind == "equation":
        return gold.text == answer.text or equal(gold, answer)
    if len(gold.parts) != len(answer.parts):
        return False
    if unordered:
        return _any_order(gold.parts, answer.parts, equal)
    return all(same_answer(g, a, equal) for g, a in zip(gold.parts, answer.parts))


def _any_order(gold: tuple[Value, ...], answer: tuple[Value, ...], equal: Equal) -> bool:
    if len({item.name for item in gold}) > 1 and not any(item.name for item in answer):
        # Only the order assigns the answer's values to the gold answer's names.
        return all(same_answer(g, a, equal) for g, a in zip(gold, answer))
    left = list(answer)
    for item in gold:
        found = next((index for index, other in enumerate(left) if same_answer(item, other, equal)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_vector(gold: Value, answer: Value, equal: Equal) -> bool:
    """Return whether a column matrix and a tuple have the same coordinates."""
    pairs = []
    for value in (gold, answer):
        column = value.kind == "matrix" and all(len(row.parts) == 1 for row in value.parts)
        pairs.append([row.parts[0] for row in value.parts] if column else value.parts)
    if any(part.kind == "row" for part in (*pairs[0], *pairs[1])) or len(pairs[0]) != len(pairs[1]):
        return False
    return all(same_answer(g, a, equal) for g, a in zip(*pairs))


def _same_with_repeats(gold: tuple[Value, ...], answer: tuple[Value, ...], equal: Equal) -> bool:
    """Compare two sets of which the answer repeats elements; repeats in the gold answer count."""
    if any(same_answer(one, other, equal) for index, one in enumerate(gold) for other in gold[:index]):
        return False
    kept = [
        item
        for index, item in enumerate(answer)
        if not any(same_answer(item, a, equal) for a in answer[:index])
    ]
    return len(kept) == len(gold) and _any_order(gold, tuple(kept), equal)


def _one_is_an_equation(gold: Value, answer: Value, equal: Equal) -> bool:
    """Compare an equation with a value: `2^3 = 8` equals 8, as all its sides do; `y = 2x` equals `y - 2x = 0`."""
    if "equation" not in (gold.kind, answer.kind):
        return False
    pair = tuple(value if value.kind == "equation" else _as_equation(value) for value in (gold, answer))
    if all(len(value.parts) == 2 for value in pair) and equal(*pair):
        return True
    if gold.kind == "equation":
        return all(same_answer(side, answer, equal) for side in gold.parts)
    return all(same_answer(gold, side, equal) for side in answer.parts)


def _as_equation(value: Value) -> Value:
    """Turn `y = 2x`, which is parsed as 2x with the name y, back into an equation; without a name it has no sides."""
    sides = (Value("scalar", value.name), value) if value.name and value.kind == "scalar" else ()
    return Value("equation", value.text, sides)
