r"""Comparison of expressions with roots, letters and functions, parsed by math-verify's LaTeX grammar.

Importing this module imports sympy and math-verify, which takes about a second. The `math` verifier imports it at the
first such answer; a worker process imports it before it reports ready.

math-verify's own comparison rounds: it accepts 1/2004! for 1/2006! and 2^{-99} for 2^{-98} (its issue 14). Here two
expressions are equal if their values agree to 40 digits, relative to their size, at every sampled point: constants are
evaluated once, expressions in letters at several points. If no value can be computed, math-verify decides. Sizes are
bounded before anything is evaluated, so `5^{5^{5^{5}}}` costs nothing.
"""

import functools
import itertools
import logging
import math
import random
import re

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from math_verify import verify
from sympy.core.function import AppliedUndef

from lpo_jax.rewards import rational
from lpo_jax.rewards.rational import MAX_BITS, TooLarge

MAX_CHARS = 400
MAX_DEPTH = 10  # nested braces and parentheses; the grammar's time grows as a power of the depth
MAX_BARS = 8  # bars as in |x|, for the same reason
DIGITS = 60  # precision of values
AGREE = sympy.Float(10, DIGITS) ** -40
TINY = sympy.Float(10, DIGITS) ** -30  # a smaller value may be the rounding error of terms that cancel

# Silences a warning that math-verify's timeout is off. It is off on purpose: it uses signals, and fails in threads.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Commands that only build expressions. Others compute while they are parsed (determinants, eigenvalues, sums), or do
# not mean a number.
_ALLOWED = frozenset(
    re.findall(
        r"\\[a-z]+",
        r"""\frac \sqrt \cdot \pi \infty \binom \ln \log \exp \sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan
        \sinh \cosh \tanh \lfloor \rfloor \lceil \rceil \alpha \beta \delta \epsilon \varepsilon \zeta \eta
        \theta \vartheta \kappa \lambda \mu \nu \xi \rho \sigma \tau \phi \varphi \chi \psi \omega \hbar \ell""",
    )
)
# Symbols that the grammar misreads: as the gamma function, the imaginary unit, the transpose of a matrix, or a
# differential (dx). It also turns Greek capitals into lower case. Each is renamed to an unused letter.
_RENAMED = {
    r"\gamma": r"\varpi ",
    r"\Delta": r"\varrho ",
    r"\Omega": r"\varsigma ",
    "I": r"\iota ",
    "T": r"\upsilon ",
    "d": r"\Lambda ",
}
_TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|.", re.DOTALL)
# Digits in a base (52_8), ratios and times of day (3:1), primes, derivatives, words: compared as text, or not at all.
_NO_NUMBER = re.compile(r"[0-9][A-Z]*_\{|\)_\{|[0-9] [0-9]|[:&;=<>#\"']|[A-Za-z]{5,}|\{d[^{}]*\}\{d")
_DEGREES = re.compile(r"([0-9.]+|\\frac\{[0-9]+\}\{[0-9]+\})\^\{\\circ\}")
_LOG = re.compile(r"\\log(?![A-Za-z_])")
_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
_MIXED = re.compile(r"(?<![0-9}])([0-9]+)(\\frac\{[0-9]+\}\{[0-9]+\})(?![!^])")
_REPEATING = re.compile(r"[0-9]*\.[0-9]*\\overline\{[0-9]+\}")
_BINOMIAL = re.compile(r"\\binom\{([0-9]{1,5})\}\{([0-9]{1,5})\}")
_CONFIG = ConversionConfig(lowercase_symbols=False)  # r is not R
_I = sympy.Symbol("i", real=True)  # which the grammar leaves a letter
_LARGEST = 20  # of the unknowns where exponents may grow with them


def equal(gold: str, answer: str) -> bool:
    """Return whether two scalars in canonical LaTeX are equal; False if one of them cannot be parsed.

    Raises:
      TooLarge: if a number in one of them is out of bounds.
    """
    if r"\ln" in gold:
        answer = _LOG.sub(r"\\ln", answer)  # if the gold answer has natural logarithms, log means ln
    expressions = read_expression(gold), read_expression(answer)
    if None in expressions:
        return False
    if expressions[0] == expressions[1]:
        return True
    pairs = _values(expressions)
    if pairs:
        return all(_close(*pair) for pair in pairs)
    return verify(*expressions, numeric_precision=DIGITS, timeout_seconds=None)


def same_equation(gold: tuple[str, str], answer: tuple[str, str]) -> bool:
    """Return whether two equations, each given by its two sides, are equivalent.

    They are if the differences of their sides have a constant ratio.

    Raises:
      TooLarge: if a number in one of them is out of bounds.
    """
    sides = [read_expression(side) for side in (*gold, *answer)]
    if None in sides:
        return False
    pairs = _values((sides[0] - sides[1], sides[2] - sides[3]))
    ratios = [g / a for g, a in pairs if abs(a) > AGREE and abs(g) > AGREE]
    return len(ratios) >= 3 and all(_close(ratio, ratios[0]) for ratio in ratios)


class _Grammar(_Latex2Sympy):
    """math-verify's grammar with two rules changed."""

    def convert_func(self, func):
        r"""Make an odd root of a negative number real, such as \sqrt[3]{-8} = -2; the original makes it complex."""
        root = super().convert_func(func)
        if not (func.FUNC_SQRT() and func.root and isinstance(root, sympy.Pow)):
            return root
        base, exponent = root.args
        if not exponent.is_Rational or exponent.p != 1 or exponent.q % 2 == 0 or _unknowns(base):
            return root
        _size(base)  # checks the bound, because the base is evaluated next
        value = _value(base, {})
        if value is None or sympy.im(value) or not value < 0:
            return root
        positive = sympy.Mul(-1, base, evaluate=False)
        return sympy.Mul(-1, sympy.Pow(positive, exponent, evaluate=False), evaluate=False)

    def convert_postfix_list(self, arr, i=0):
        """Make adjacent factors a product; the original reads 2(3) as the mixed number 5."""
        return sympy.Mul(*(self.convert_postfix(factor) for factor in arr[i:]), evaluate=False)


@functools.lru_cache(maxsize=512)
def read_expression(text: str) -> sympy.Expr | None:
    """Parse canonical LaTeX to an unevaluated expression; return None if it is not a number, or not in the grammar.

    Raises:
      TooLarge: if the text would take too long to parse or to evaluate.
    """
    if len(text) > MAX_CHARS:
        raise TooLarge(f"longer than {MAX_CHARS} characters")
    text = _REPEATING.sub(_as_fraction, _MIXED.sub(r"(\1+\2)", text))
    text = _BINOMIAL.sub(_as_number, text)
    # Decimals become exact fractions; the grammar would make them floats of 15 digits.
    text = _DECIMAL.sub(lambda match: rf"\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}", text)
    text = _DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    tokens = _TOKEN.findall(text)
    if _NO_NUMBER.search("".join("\\" if token[0] == "\\" else token for token in tokens)):
        return None
    if any(token[0] == "\\" and token not in _ALLOWED and token not in _RENAMED for token in tokens):
        return None
    if _depth(text) > MAX_DEPTH or text.count("|") > MAX_BARS:
        raise TooLarge(f"nested deeper than {MAX_DEPTH} levels, or more than {MAX_BARS} bars")
    if r"\binom" in text and re.search(r"[0-9]{4}", text):  # binomials are evaluated while they are parsed
        raise TooLarge("a binomial of more than 999")
    text = "".join(_RENAMED.get(token, token) for token in tokens)
    try:
        expression = _Grammar(is_real=True, config=_CONFIG).parse(text)
    except Exception:  # the grammar raises Exception itself, and its conversion whatever sympy raises
        return None
    if not isinstance(expression, sympy.Expr) or expression.has(sympy.Derivative):
        return None
    _size(expression)
    return expression.xreplace({_I: sympy.I})


def _as_fraction(decimal: re.Match[str]) -> str:
    number = rational.value(decimal[0])
    return decimal[0] if number is None else rf"\frac{{{number.numerator}}}{{{number.denominator}}}"


def _as_number(binomial: re.Match[str]) -> str:
    """Replace a binomial by its value if that is cheap; the grammar evaluates the others while it parses."""
    top, bottom = int(binomial[1]), int(binomial[2])
    if min(bottom, top - bottom) > 12:
        return binomial[0]
    return f"({math.comb(top, bottom)})"


def _depth(text: str) -> int:
    return max(itertools.accumulate((c in "({[") - (c in ")}]") for c in text), default=0)


def _size(expression: sympy.Expr) -> float:
    """Return an upper bound on the bits of the rational numbers that an evaluation at the sampled points computes.

    Parts are checked first, so an exponent is evaluated only if it is known to be small enough.

    Raises:
      TooLarge: if the expression or a part of it needs more than `MAX_BITS`.
    """
    sizes = [_size(part) for part in expression.args]
    if isinstance(expression, sympy.Rational):
        bits = expression.p.bit_length() + expression.q.bit_length()
    elif isinstance(expression, sympy.Pow):
        bits = sizes[0] * max(1.0, _magnitude(expression.exp))
    elif isinstance(expression, sympy.exp):
        bits = 2 * _magnitude(expression.args[0])
    elif isinstance(expression, sympy.factorial | sympy.binomial):
        largest = max(2.0, _magnitude(expression.args[0]))
        bits = largest * math.log2(largest)
    else:
        bits = 8 + sum(sizes)
    if not bits <= MAX_BITS:
        raise TooLarge(f"a number of more than {MAX_BITS:,} bits")
    return bits


def _magnitude(expression: sympy.Expr) -> float:
    """Return the absolute value with every unknown at its largest; 1 if there is no value."""
    if expression.is_Rational:
        return abs(float(expression))
    value = _value(expression, {unknown: sympy.Integer(_LARGEST) for unknown in _unknowns(expression)})
    return 1.0 if value is None else float(abs(value))


def _unknowns(expression: sympy.Expr) -> set[sympy.Expr]:
    """Return the letters and the applications of unknown functions, such as f(4)."""
    return expression.free_symbols | expression.atoms(AppliedUndef)


def _values(pair: tuple[sympy.Expr, sympy.Expr]) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """Return the values of two expressions at each sampled point at which both have one."""
    unknowns = sorted(_unknowns(pair[0]) | _unknowns(pair[1]), key=str)
    real = unknowns and not any(expression.has(sympy.I) for expression in pair)
    found = []
    for point in _points(unknowns, pair):
        values = tuple(_value(expression, point) for expression in pair)
        # x sqrt(x) at a negative x: the question is about values of x for which the expression is real.
        if None not in values and not (real and sympy.im(values[0])):
            found.append(values)
    return found


def _points(
    unknowns: list[sympy.Expr], pair: tuple[sympy.Expr, ...]
) -> list[dict[sympy.Expr, sympy.Rational]]:
    """Return the sample points: one for constants; else fractions of both signs, or integers if necessary."""
    if not unknowns:
        return [{}]
    rng = random.Random(0)
    powers = set().union(*(expression.atoms(sympy.Pow) for expression in pair))
    in_exponents = any(_unknowns(power.exp) for power in powers)
    signs = any(power.base.is_negative and _unknowns(power.exp) for power in powers)
    rounds = any(expression.has(sympy.floor, sympy.ceiling) for expression in pair)
    counts = any(expression.has(sympy.factorial, sympy.binomial) for expression in pair)
    if rounds or counts or signs:
        tops = [8] * 8 + [_LARGEST] * 8 + ([5000] * 8 if rounds and not (in_exponents or counts) else [])
        return [{unknown: sympy.Integer(rng.randint(1, top)) for unknown in unknowns} for top in tops]
    scales = [(1, 1), (1, 1), (10, 10), (10, 10), (-1, 1), (-1, 1), (-10, 10)]
    return [
        {unknown: sympy.Rational(rng.choice(signs) * rng.randint(300, 1500), 997) for unknown in unknowns}
        for signs in scales
    ]


def _value(expression: sympy.Expr, point: dict[sympy.Expr, sympy.Rational]) -> sympy.Expr | None:
    """Return the value at a point to `DIGITS` digits, or an infinity; None if there is no value."""
    try:
        number = expression.xreplace(point)
        value = number.evalf(DIGITS)
        if value in (sympy.oo, -sympy.oo):
            return value
        parts = value.as_real_imag()
        if not all(part.is_Rational or part.is_Float for part in parts):
            return None
        # A part that changes with more digits is rounding error, and is zero: sqrt(2) sqrt(3) - sqrt(6).
        if any(0 < abs(part) < TINY for part in parts):
            again = number.evalf(2 * DIGITS).as_real_imag()
            parts = [part if _close(part, other) else sympy.Integer(0) for part, other in zip(parts, again)]
    except Exception:  # sympy raises many kinds of errors if a function has no value
        return None
    return parts[0] + sympy.I * parts[1]


def _close(a: sympy.Expr, b: sympy.Expr) -> bool:
    if sympy.oo in (abs(a), abs(b)):
        return a == b
    return bool(abs(a - b) <= AGREE * max(abs(a), abs(b)))
