"""Compare what an untrusted program printed or returned with what was expected.

Both comparisons run outside the sandbox, on plain text and parsed JSON, in time proportional to the length of the text.
No object of the program is constructed, hashed or called, so its own `__eq__` or crafted hash collisions have no
effect.

An expected decimal (with a point or an exponent) matches within 1e-8 + 1e-5 times its absolute value, which is PRIME's
tolerance (`numpy.allclose`). An expected integer matches only that integer; in printed output it may also be written as
a decimal (`3.0` for `3`), as in PRIME.
"""

import json
import math
import re
from collections.abc import Mapping, Set

from lpo_jax.types import Json

_INTEGER = re.compile(r"[+-]?[0-9]++")
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]{1,4})?")
_MAX_INNER_SET = 1000  # elements; a program may choose ones whose hashes collide
# Characters of JSON per character of `repr`: one beyond the Basic Multilingual Plane takes 12 per character, 1j takes
# 11.
_MAX_MARKUP = 20
_EXACT_DIGITS = 15  # integers with up to this many digits are exact as floats


def same_output(printed: str, expected: str) -> bool:
    """Return whether a program printed what was expected: the same lines with the same words.

    Blank lines and the amount of whitespace are ignored; case and the order of lines matter. (PRIME also accepts lines
    in any order, which rewards a program that should sort but does not.)
    """
    if printed == expected:
        return True
    lines, wanted = ([line for line in text.splitlines() if line.strip()] for text in (printed, expected))
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def _same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    words, expected = line.split(), wanted.split()
    return len(words) == len(expected) and all(map(_same_word, words, expected))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if not _NUMBER.fullmatch(word) or not _NUMBER.fullmatch(wanted):
        return False
    if not _INTEGER.fullmatch(wanted):
        return _close(float(word), float(wanted))
    if _INTEGER.fullmatch(word):
        return _canonical(word) == _canonical(wanted)
    return len(wanted) <= _EXACT_DIGITS and abs(float(word) - int(wanted)) <= 1e-6


def _canonical(integer: str) -> str:
    digits = integer.lstrip("+-").lstrip("0")
    return f"-{digits}" if integer[0] == "-" and digits else digits


def _close(value: float, wanted: float) -> bool:
    return value == wanted or abs(value - wanted) <= 1e-8 + 1e-5 * abs(wanted)


def same_result(claim: bytes, expected: Json) -> bool:
    """Return whether a function's result, encoded by `sandbox_child.encode_result` as JSON, is the expected value.

    The comparison is Python's `==` on builtin types, except that tuples equal lists, and floats have the tolerance
    above. So `1 == True` and `3.0 == 3`, and a list never equals a set.

    Args:
      claim: the bytes from the sandbox. Anything that is not such JSON equals no value.
      expected: a value of builtin types.
    """
    try:
        if len(claim) > _MAX_MARKUP * len(repr(expected)) + 1000:
            return False  # much longer than the JSON of any equal value
        return _same(json.loads(claim), expected)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError):
        return False


def _same(claim: Json, expected: Json) -> bool:
    kind, held = _tagged(claim)
    match expected:
        case None | str() | bytes():
            return (bytes.fromhex(held) if kind == "bytes" else claim) == expected
        case complex():
            return kind == "complex" and complex(*held) == expected
        case float():
            number = _number(kind, held)
            both_nan = number is not None and math.isnan(number) and math.isnan(expected)
            return both_nan or (number is not None and _close(float(number), expected))
        case int():
            return _number(kind, held) == expected
        case list() | tuple():
            if not isinstance(claim, list) or len(claim) != len(expected):
                return False
            return all(map(_same, claim, expected))
        case set() | frozenset():
            return kind == "set" and len(held) == len(expected) == len(_found(held, expected))
        case dict():
            if kind != "dict" or len(held) != len(expected):
                return False
            keys = [key for key, _ in held]
            return len(_found(keys, expected)) == len(expected) and all(
                _same(value, expected[_key(key)]) for key, value in held
            )
    return False


def _tagged(claim: Json) -> tuple[str, Json]:
    """Return (key, content) of an object with one key, which `encode_result` makes; else `""` and the claim."""
    if not isinstance(claim, dict):
        return "", claim
    ((kind, held),) = claim.items()
    return kind, held


def _found(claims: list[Json], expected: Set[Json] | Mapping[Json, Json]) -> set[Json]:
    """Look up claims in a trusted set, because hashes in a set of claims may collide on purpose."""
    return {key for key in map(_key, claims) if key in expected}


def _number(kind: str, held: Json) -> int | float | None:
    if kind == "int":
        return int(held, 16)
    return held if isinstance(held, int | float) else None


def _key(claim: Json) -> Json:
    """Convert a claim to a hashable value, for an element of a set or a key."""
    if isinstance(claim, list):
        return tuple(map(_key, claim))
    kind, held = _tagged(claim)
    if not kind:
        return claim
    if kind == "int":
        return int(held, 16)
    if kind == "bytes":
        return bytes.fromhex(held)
    if kind == "complex":
        return complex(*held)
    if len(held) > _MAX_INNER_SET:
        raise ValueError("a set in a set is too large")
    return frozenset(map(_key, held))
