import math
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lpo_jax import rewards
from lpo_jax.errors import UserError
from lpo_jax.rewards.math import parses

verify = rewards.get("math")
fast = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def outcome(gold, answer, verifier=verify):
    return verifier(rf"so it is $\boxed{{{answer}}}$.", {"answer": gold}).outcome


SAME = [
    # rational numbers
    ("0.5", r"\dfrac{1}{2}"),
    (r"\frac 59", r"\tfrac59"),
    (r"1\frac{4}{5}", "1.8"),
    (r"137 \frac{1}{2}", r"\frac{275}{2}"),
    (r"0.\overline{3}", "1/3"),
    (".0000672", "6.72e-5"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("2^{1009}", r"2 \cdot 2^{1008}"),
    (r"\frac{100!}{2^{50}}", "100!/2^50"),
    (r"10,\!080", "10080"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("58,500", "58500"),
    ("58500", r"58\,500"),
    (27.0, "27"),
    (42, "42."),
    # units, percent signs, surrounding text
    (r"\$32,\!348", "32348"),
    (r"90^\circ", "90"),
    ("90", r"90^{\circ}"),
    ("90", r"90 \text{ degrees}"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"15\mbox{ cm}^2", r"15 \text{ square centimeters}"),
    ("5", "5 cm"),
    ("575", "575 students"),
    ("62.5%", "62.5"),
    ("62.5%", r"\frac58"),
    ("50", r"50\%"),
    ("0.08", r"8\%"),
    ("5", "x = 5"),
    ("x=5", "5"),
    ("8", "2^3 = 8"),
    ("18", r"\(18\)"),
    ("18", "**18**"),
    ("12", r"\boxed{12}"),
    (r"\boxed{12}", "12"),
    # lists, sets, tuples, intervals, matrices
    ("1,-2", "-2, 1"),
    ("3, 5, 7", r"\{7, 3, 5\}"),
    ("1,2", r"x=1 \text{ or } x=2"),
    (r"12\text{ and }13", "12, 13"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1-\sqrt5, 1+\sqrt5"),
    ("-1,0,1", r"0, \pm 1"),
    ("n=2,3,4", "2,3,4"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("(1,2),(3,4)", "(3, 4), (1, 2)"),
    (r"x \in [-2,7]", r"-2 \le x \le 7"),
    (r"(2,\infty)", "x > 2"),
    (r"k \geqslant 2", r"[2, \infty)"),
    (r"(0,9) \cup (9,36)", r"(9,36)\cup(0,9)"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{bmatrix} -\frac13 \\[2pt] \frac23 \end{bmatrix}"),
    # equations
    ("y = 2x + 3", "3 + 2x"),
    ("y = 2x + 3", "2x - y + 3 = 0"),
    ("5x - 7y + 11z + 4 = 0", "-10x + 14y - 22z = 8"),
    ("f(x)=2x", "2x"),
    (r"\angle B E A_{1}=90,\angle A E B_{1}=90", "90, 90"),
    # expressions
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"11\sqrt2", r"\sqrt{242}"),
    (r"\frac{20000}{\pi}", r"\frac{20000}{\pi} \approx 6366.2"),
    ("6 - 5i", "-5i+6"),
    ("2i", "(1+i)^2"),
    ("x^5 - x^4", "x^4(x-1)"),
    (r"30p\sqrt{p}", r"30\sqrt{p^3}"),
    (r"\binom{2n}{n}", r"\frac{(2n)!}{n!n!}"),
    (r"\lceil n/2\rceil+1", r"\left\lfloor \frac{n+1}{2} \right\rfloor + 1"),
    (r"2\cos 15^\circ", r"\frac{\sqrt6+\sqrt2}{2}"),
    (r"\frac{1}{4}-\ln 2", r"0.25 - \log 2"),
    ("0", r"\sqrt2\sqrt3-\sqrt6"),
    (r"\infty", r"+\infty"),
    # words
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
    (r"\text{A, B}", "B and A"),
    (r"\text{No}", "no"),
    ("52_8", "52_{8}"),
    (r"\frac{2015 \cdot 2013}{4} \text{ OR } \frac{4056195}{4}", "4056195/4"),
]

DIFFERENT = [
    # math-verify's issue 14
    ("1/2004!", "1/2006!"),
    ("2^{-99}", "2^{-98}"),
    (r"\sqrt{2} \cdot 2^{-99}", r"\sqrt{2} \cdot 2^{-98}"),
    ("n=2,3,4", "n=1,2,3"),
    ("2021", r"\pm 2021"),
    ("2021", "pm2021"),
    # no tolerance
    ("1/3", "0.3333333333"),
    (r"\frac{\sqrt3}{2}", "0.8660254037844386"),
    (r"\sqrt{2}", r"\sqrt{2} + 10^{-30}"),
    ("0", r"10^{-60}\sqrt2"),
    # misread by math-verify's grammar
    (r"\sqrt{2}+5", r"\sqrt{2}+2(3)"),
    ("x+8", r"x+2\binom{4}{2}"),
    ("x", "x^{T}"),
    ("x", "x'"),
    (r"\gamma^2-1", r"\gamma^2-2"),
    (r"\Delta", r"\delta"),
    ("2RC", "2rc"),
    (r"\frac{x}{t}", r"\frac{dx}{dt}"),
    (r"\sqrt{2}+7", r"\sqrt{2}+3 4"),
    ("34", "3 4"),
    # structure
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(3,4]", "[3,4)"),
    ("1,2", "1,2,3"),
    ("1,2", "1,1"),
    (r"\{1,2\},\{3\}", r"\{1\},\{2,3\}"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4\end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4\end{pmatrix}"),
    (r"(2,\infty)", r"x \ge 2"),
    (r"\infty", r"-\infty"),
    ("f(n)=n, g(n)=1", "g(n)=n, f(n)=1"),
    # names, hedges, equations
    ("x=5", "y=5"),
    ("5", "4=5"),
    ("5", r"5 \text{ or } 6"),
    ("y=2x+3", "y=2x-3"),
    ("5x - 7y = 4", "5x - 7y = -4"),
    # units
    (r"5.4 \text{ cents}", r"5.4 \text{ dollars}"),
    (r"10 \text{ cm}", r"10\%"),
    (r"10\%", r"10 \text{ cm}"),
    (r"15 \text{ cm}^2", r"15 \text{ cm}^3"),
    (r"9\text{ a.m.}", r"9 \text{ p.m.}"),
    # letters and words
    ("x", "y"),
    ("6m", "6"),
    ("|x|", "x"),
    ("east", "seat"),
    ("52_8", "52"),
    ("52_8", "42"),
    ("8:34", "4:17"),
    (r"\lfloor n/2 \rfloor", r"\lceil n/2 \rceil"),
    ("(-1)^n", "1"),
    ("3", r"\frac{1}{0}"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same_answer_written_otherwise_passes(gold, answer):
    assert outcome(gold, answer) == "pass"


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_another_answer_does_not_pass_either_way(gold, answer):
    assert outcome(gold, answer) == "wrong"
    assert outcome(answer, gold) == "wrong"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("f(n)=n, g(n)=1", "1, n"), ("1", r"1\%"), ("x", r"\text{x is not known}"), (r"\ln 2", r"\log_{10} 2")],
)
def test_what_the_gold_answer_tells_apart_counts(gold, answer):
    assert outcome(gold, answer) == "wrong"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{1} no, \boxed{2}", "pass"),
        (r"\boxed{2} and then $\boxed{3", "pass"),  # cut off in the last box
        (r"\fbox{2}", "pass"),
        (r"\boxed {2}", "pass"),
        (r"\boxed{x = \boxed{2}}", "pass"),
        (r"} \boxed{2} {", "pass"),
        (r"\boxed{1} is wrong, it is 2", "wrong"),
        ("2", "malformed"),
        (r"\boxed{}", "malformed"),
        (r"\boxed{ }", "malformed"),
        (r"\boxed{2", "malformed"),
        ("", "malformed"),
    ],
)
def test_the_last_box_counts(response, expected):
    verdict = verify(response, {"answer": "2"})
    assert verdict.outcome == expected
    assert verdict.reward == float(expected == "pass")


UNREADABLE = [
    "",
    " ",
    "$$",
    ".",
    r"\frac{1}{",
    "x}",
    "(1,2",
    r"\boxed{}",
    "see the figure for what the answer has to be here",
]


@pytest.mark.parametrize("gold", UNREADABLE)
def test_a_gold_answer_that_cannot_be_read_never_passes(gold):
    assert not parses(gold)
    for answer in ("", "5", gold):
        verdict = verify(rf"\boxed{{{answer}}}", {"answer": gold})
        assert verdict.outcome == "infrastructure" and "gold" in verdict.parts["reason"]


@pytest.mark.parametrize("gold", ["", " "])
def test_strict_refuses_an_empty_gold_answer(gold):
    for answer in ("", "5"):
        verdict = rewards.get("math", mode="strict")(rf"\boxed{{{answer}}}", {"answer": gold})
        assert verdict.outcome == "infrastructure"


def test_parses_what_data_sets_have():
    assert all(
        parses(gold) for gold in ("42", r"\text{Evelyn}", r"x \in [-2,7]", "y^{\\prime}+r y=0", "1,2", "27.0")
    )


def test_strict_is_string_equality():
    strict = rewards.get("math", mode="strict")
    for gold, answer, expected in [
        (r"\frac{1}{2}", r"\dfrac12", "pass"),
        (r"\frac{1}{2}", "0.5", "pass"),
        (r"\frac{1}{2}", "x=1/2", "pass"),
        (r"\frac{1}{2}", r"\frac{2}{4}", "wrong"),
        ("1000", "1,000", "wrong"),
        ("90", r"90^\circ", "pass"),
        ("5", r"5\text{ cm}", "pass"),
    ]:
        assert outcome(gold, answer, strict) == expected, (gold, answer)
    assert strict(r"\boxed 5$", {"answer": "5"}).outcome == "pass"
    assert strict(r"\boxed{5} then \boxed{", {"answer": "5"}).outcome == "malformed"
    assert strict(r"\fbox{5}", {"answer": "5"}).outcome == "malformed"


def test_the_answer_on_a_line_of_its_own():
    line = rewards.get("math", extract="answer_line")
    for text in (
        "Answer: 1/2",
        "ANSWER : $\\frac12$.",
        "**Answer:** \\boxed{0.5}\nbye",
        "Answer: 3\nAnswer: 0.5",
    ):
        assert line(text, {"answer": "0.5"}).outcome == "pass", text
    assert line(r"\boxed{0.5}", {"answer": "0.5"}).outcome == "malformed"


def test_options():
    for options in ({"mode": "lenient"}, {"extract": "last"}, {"mode": "strict", "extract": "answer_line"}):
        with pytest.raises(UserError, match="math: "):
            rewards.get("math", **options)


numbers = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4)


def decimal(value):
    """Return a terminating decimal, or None."""
    for places in range(9):
        if (value * 10**places).denominator == 1:
            digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
            return "-" * (value < 0) + digits[: len(digits) - places] + "." + digits[len(digits) - places :]
    return None


def spellings(value):
    top, bottom, sign = abs(value.numerator), value.denominator, "-" * (value < 0)
    yield rf"{sign}\frac{{{top}}}{{{bottom}}}"
    yield rf"\dfrac{{{value.numerator}}}{{{bottom}}}"
    yield f"{value.numerator} / {bottom}"
    yield rf"{sign}\left( {7 * top} \right) / ({bottom} \cdot 7)"
    yield rf"{sign}{top} \times {bottom}^{{-1}}"
    if decimal(value) is not None:
        yield decimal(value)
        yield decimal(value) + "00"
    if top > bottom > 1:
        yield rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"
    if bottom == 1:
        yield f"{value.numerator:,}"
        yield f"{sign}{top}.0"
        yield rf"\${top}" if not sign else f"${value.numerator}$"


@fast
@given(numbers, st.data())
def test_a_rational_number_in_any_spelling_passes_and_another_does_not(value, data):
    ways = list(spellings(value))
    gold, answer = data.draw(st.sampled_from(ways)), data.draw(st.sampled_from(ways))
    assert outcome(gold, answer) == "pass"
    other = data.draw(numbers | st.just(-value) | st.just(value + 1) | st.just(value + Fraction(1, 10**9)))
    assume(other != value)
    assert outcome(gold, data.draw(st.sampled_from(list(spellings(other))))) == "wrong"


VALUES = {
    "x": 1.37,
    "y": 0.61,
    "\\pi": math.pi,
    "e": math.e,
    "\\gamma": 2.2,
    "d": 3.1,
    "T": 0.7,
    "I": 1.9,
    "R": 0.3,
}
POSITIVE = st.integers(1, 12).map(lambda n: (str(n), float(n))) | st.sampled_from(list(VALUES.items()))
LEAVES = POSITIVE | POSITIVE.map(lambda p: (rf"\sqrt{{{p[0]}}}", p[1] ** 0.5)) | st.just(("i", 1j))


def combine(children):
    """Generate expressions in LaTeX together with their values, computed by Python."""
    two, one = st.tuples(children, children), children
    return st.one_of(
        two.map(lambda p: (f"{p[0][0]}+{p[1][0]}", p[0][1] + p[1][1])),
        two.map(lambda p: (f"{p[0][0]}-({p[1][0]})", p[0][1] - p[1][1])),
        two.map(lambda p: (f"({p[0][0]})({p[1][0]})", p[0][1] * p[1][1])),
        two.map(lambda p: (rf"({p[0][0]}) \cdot ({p[1][0]})", p[0][1] * p[1][1])),
        two.map(lambda p: (rf"\dfrac{{{p[0][0]}}}{{{p[1][0]}}}", p[0][1] / p[1][1] if p[1][1] else math.nan)),
        st.tuples(one, st.integers(1, 3)).map(lambda p: (rf"\left({p[0][0]}\right)^{p[1]}", p[0][1] ** p[1])),
        st.tuples(st.integers(2, 9), one).map(lambda p: (f"{p[0]}({p[1][0]})", p[0] * p[1][1])),
    )


@fast
@given(st.recursive(LEAVES, combine, max_leaves=6))
def test_expressions_are_read_as_they_are_written(expression):
    from lpo_jax.rewards import symbolic
    from lpo_jax.rewards.latex import canonical

    text, expected = expression
    assume(expected == expected and abs(expected) < 1e12)
    read = symbolic.read_expression(canonical(text))
    letters = {"varpi": "\\gamma", "Lambda": "d", "upsilon": "T", "iota": "I"}  # renamed symbols
    point = {symbol: VALUES[letters.get(symbol.name, symbol.name)] for symbol in read.free_symbols}
    error = abs(complex(read.subs(point).evalf(20)) - expected)
    np.testing.assert_array_less(error, 1e-6 * max(1, abs(expected)))


@fast
@given(st.recursive(LEAVES, combine, max_leaves=4))
def test_an_expression_equals_itself_and_not_itself_plus_a_little(expression):
    text, value = expression
    assume(value == value)
    assert outcome(text, rf"\left({text}\right) \cdot 1") == "pass"
    assert outcome(text, rf"{text} + 10^{{-12}}") == "wrong"


def test_the_same_verdicts_in_a_thread_and_in_the_pool():
    cases = [*SAME[::5], *DIFFERENT[::5]]
    responses, examples = (
        [rf"\boxed{{{answer}}}" for _, answer in cases],
        [{"answer": gold} for gold, _ in cases],
    )
    expected = [verify(response, example) for response, example in zip(responses, examples)]
    found = []
    thread = threading.Thread(target=lambda: found.extend(map(verify, responses, examples)))
    thread.start()
    thread.join()
    assert found == expected
    with rewards.VerifierPool("math", workers=1, timeout=20.0) as pool:
        assert pool.verify(responses, examples) == expected


def test_sympy_is_only_imported_where_it_is_needed():
    program = (
        "import sys; from lpo_jax import rewards; m = rewards.get('math'); rewards.VerifierSpec('math');"
        r"assert m(r'\boxed{\frac12}', {'answer': '0.5'}).outcome == 'pass';"
        r"assert m(r'\boxed{1,3}', {'answer': '1,2'}).outcome == 'wrong';"
        "assert not {'sympy', 'math_verify', 'jax'} & set(sys.modules);"
        r"assert m(r'\boxed{\sqrt8}', {'answer': r'2\sqrt2'}).outcome == 'pass'; assert 'sympy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
