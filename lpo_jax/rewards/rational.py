r"""Exact arithmetic on canonical LaTeX: `\frac{3}{4}`, `1\frac{1}{2}`, `2^{10}\cdot 5`, `4.5e33`, `0.\overline{3}`.

Most answers are compared here, in microseconds and without tolerance. Letters, roots and functions are not supported.
"""

import math
import re
from fractions import Fraction

MAX_BITS = 32_768  # 2006! has 19,000 bits; larger numbers are not worth their cost
MAX_COUNT = 3_000  # largest argument of a factorial or binomial
MAX_DEPTH = 50
MAX_SERIES = 20_000  # terms of a sum or product, times the characters of the term

_NUMBER = re.compile(
    r"(?P<digits>[0-9]+(?:\.[0-9]*)?|\.[0-9]+|\.(?=\\overline))(?:\\overline\{(?P<repeated>[0-9]+)\}|[eE](?P<exponent>[+-]?[0-9]+))?"
)
_SERIES = re.compile(r"\\(sum|prod)_\{([A-Za-z])=(-?[0-9]{1,6})\}\^\{(-?[0-9]{1,6})\}(.+)", re.DOTALL)
_TOKEN = re.compile(r"\\[A-Za-z]+|.", re.DOTALL)
_MIXED = re.compile(r"\\frac\{[0-9]+\}\{[0-9]+\}(?![!^])")


class TooLarge(ArithmeticError):
    """A number of more than 32,768 bits."""


class _NotArithmetic(ValueError):
    pass


def value(text: str) -> Fraction | None:
    """Return the exact value; None if the text is not arithmetic of rational numbers, or divides by zero.

    Args:
      text: LaTeX in the spelling of `latex.canonical`.

    Raises:
      TooLarge: if an intermediate number has more than 32,768 bits.
    """
    try:
        series = _SERIES.fullmatch(text)
        return _series(*series.groups()) if series else _parsed(text)
    except (_NotArithmetic, ZeroDivisionError):
        return None


def _parsed(text: str) -> Fraction:
    parser = _Parser(text)
    result = parser.sum(MAX_DEPTH)
    parser.end()
    return result


def _series(kind: str, variable: str, first: str, last: str, term: str) -> Fraction:
    """Evaluate a sum or product over integers, whose term has no sum or quotient outside brackets."""
    tokens, depth = _TOKEN.findall(term), 0
    for token in tokens:
        depth += (token in "({[") - (token in ")}]")
        if token == "/" or (depth == 0 and token in "+-"):
            raise _NotArithmetic  # it is ambiguous what belongs to the term
    count = int(last) - int(first) + 1
    if not 0 < count * len(term) <= MAX_SERIES:
        raise _NotArithmetic
    total = Fraction(kind == "prod")
    for index in range(int(first), int(last) + 1):
        value = _parsed("".join(f"({index})" if token == variable else token for token in tokens))
        total = _bounded(total * value if kind == "prod" else total + value)
    return total


class _Parser:
    """A recursive-descent parser that evaluates; the size of every intermediate number is bounded."""

    def __init__(self, text: str):
        self._text, self._at = text, 0

    def end(self) -> None:
        if self._at != len(self._text):
            raise _NotArithmetic

    def _skip(self, *tokens: str) -> str | None:
        """Consume the next token if it is one of `tokens`, and return it; else return None."""
        while self._text.startswith(" ", self._at):
            self._at += 1
        for token in tokens:
            if self._text.startswith(token, self._at):
                self._at += len(token)
                return token
        return None

    def _need(self, token: str) -> None:
        if not self._skip(token):
            raise _NotArithmetic

    def sum(self, depth: int) -> Fraction:
        if depth == 0:
            raise _NotArithmetic
        total = self._product(depth)
        while sign := self._skip("+", "-"):
            term = self._product(depth)
            total = _bounded(total + term if sign == "+" else total - term)
        return total

    def _product(self, depth: int) -> Fraction:
        sign = -1 if self._skip("-") else 1
        self._skip("+")
        product = self._power(depth)
        while True:
            if self._skip(r"\cdot", "*"):
                factor = self._signed(depth)
            elif self._skip("/"):
                factor = 1 / self._signed(depth)
            elif self._text.startswith(("(", "[", "{", r"\frac", r"\binom"), self._at):
                factor = self._power(depth)  # 2(3)
            else:
                return sign * product
            product = _bounded(product * factor)

    def _signed(self, depth: int) -> Fraction:
        return -self._power(depth) if self._skip("-") else self._power(depth)

    def _power(self, depth: int) -> Fraction:
        base = self._atom(depth)
        while self._skip("!"):
            base = Fraction(math.factorial(_count(base)))
        if self._skip("^"):
            self._need("{")
            exponent = self.sum(depth - 1)
            self._need("}")
            base = _power(base, exponent)
        return base

    def _atom(self, depth: int) -> Fraction:
        if self._skip(r"\frac"):
            top, bottom = self._argument(depth), self._argument(depth)
            return _bounded(top / bottom)
        if self._skip(r"\binom"):
            top, bottom = self._argument(depth), self._argument(depth)
            return Fraction(math.comb(_count(top), _count(bottom)))
        if bracket := self._skip("(", "[", "{"):
            inside = self.sum(depth - 1)
            self._need({"(": ")", "[": "]", "{": "}"}[bracket])
            return inside
        return self._number()

    def _argument(self, depth: int) -> Fraction:
        self._need("{")
        inside = self.sum(depth - 1)
        self._need("}")
        return inside

    def _number(self) -> Fraction:
        match = _NUMBER.match(self._text, self._at)
        if not match:
            raise _NotArithmetic
        self._at = match.end()
        number = Fraction(match["digits"].rstrip(".") or 0)
        if match["repeated"]:
            if "." not in match["digits"]:
                raise _NotArithmetic
            places = len(match["digits"].partition(".")[2])
            period = len(match["repeated"])
            number += Fraction(int(match["repeated"]), 10**places * (10**period - 1))
        if match["exponent"]:
            number *= _power(Fraction(10), Fraction(match["exponent"]))
        if mixed := _MIXED.match(self._text, self._at) if number.denominator == 1 else None:
            top, bottom = re.findall("[0-9]+", mixed[0])
            self._at = mixed.end()
            number += Fraction(int(top), int(bottom))  # 1\frac{4}{5}
        return number


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
        raise TooLarge(f"a number of more than {MAX_BITS:,} bits")
    return number


def _count(number: Fraction) -> int:
    if number.denominator != 1 or number < 0:
        raise _NotArithmetic
    if number > MAX_COUNT:
        raise TooLarge(f"a factorial or binomial of more than {MAX_COUNT:,}")
    return int(number)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise _NotArithmetic  # the power is a root
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and base != 0 and bits * abs(exponent) > MAX_BITS:
        raise TooLarge(f"a power of more than {MAX_BITS:,} bits")
    return base ** int(exponent)
