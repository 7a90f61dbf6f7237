r"""Forms of mathematical answers, each with equal answers and with similar but different ones."""

import pytest

from lpo_jax import rewards

verify = rewards.get("math")

# form: pairs that are equal, whichever is the gold answer
RIGHT = {
    "mixed numbers": [
        ("1.8", "1 4/5"),
        (r"1\frac{4}{5}", "1 4/5"),
        ("3 1/2", "7/2"),
        ("-2 1/3", r"-\frac73"),
        ("3.5", "3½"),
        ("0.5", "½"),
        (r"3\frac12", "3 1/2"),
        (r"\sqrt{2}+\frac72", r"3 1/2+\sqrt2"),
        (r"3\frac{1}{2}\text{ cm}", "3 1/2 cm"),
        ("(1 1/2, 2)", "(1.5,2)"),
    ],
    "absolute values": [
        ("|x|", "abs(x)"),
        ("|x-1|", r"\operatorname{abs}(x-1)"),
        ("2|x+1|", "2abs(x+1)"),
        ("|x|+1", r"\left|x\right|+1"),
        ("abs(x)", r"\lvert x\rvert"),
        (r"\sqrt{x^2}", "abs(x)"),
    ],
    "real numbers without a point": [
        (r"\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)"),
        (r"(-\infty,1)\cup(1,\infty)", r"\mathbb R \backslash \{1\}"),
        (r"\mathbb{R}\setminus\{-1,2\}", r"(-\infty,-1)\cup(-1,2)\cup(2,\infty)"),
        (r"\mathbb{R}-\{0\}", r"(-\infty,0)\cup(0,\infty)"),
        (r"x\in\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)"),
        (r"\mathbb{R}", r"(-\infty,\infty)"),
        (r"(-\infty,\infty)", r"x\in\mathbb R"),
        (r"(-\infty,1)\cup(1,\infty)", r"x\ne 1"),
        (r"\mathbb{R}\setminus\{1,2\}", r"\mathbb{R}\setminus\{2,1\}"),
        (r"(-\infty,\sqrt2)\cup(\sqrt2,\infty)", r"\mathbb{R}\setminus\{\sqrt{2}\}"),
    ],
    "repeated elements": [
        (r"\{1,1,2\}", r"\{1,2,1\}"),
        ("1,1,2", "2,1,1"),
    ],
    "or": [
        (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \text{ or } x>1"),
        (r"(-\infty,-1]\cup[1,\infty)", r"x\le -1 or x \ge 1"),
        (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \lor x>1"),
        (r"x<-1\text{ or }x>1", r"x>1\text{ or }x<-1"),
        (r"(0,1)\cup(2,3)", r"0<x<1 \text{ or } 2<x<3"),
        (r"x=1\text{ or }x=2", "2,1"),
        (r"x<-1\text{ or }x>1", r"(-\infty,-1)\cup(1,\infty)"),
        (r"(-\infty,-1)\cup(1,\infty)", r"(-\infty,-1) or (1,\infty)"),
        (r"[0,1)\text{ or }(2,3)", r"(2,3)\cup[0,1)"),
        ("(1,2) or (3,4)", "(3,4),(1,2)"),  # points
    ],
    "empty sets": [
        (r"\emptyset", r"\{\}"),
        (r"\varnothing", r"\{\,\}"),
        (r"\{\}", "∅"),
        (r"\emptyset", r"\emptyset"),
    ],
    "odd roots": [
        ("-2", r"\sqrt[3]{-8}"),
        (r"-\sqrt[3]{2}", r"\sqrt[3]{-2}"),
        (r"\sqrt[3]{-2}+1", r"1-\sqrt[3]{2}"),
        (r"-\sqrt[5]{3}", r"\sqrt[5]{-3}"),
        ("3", r"\sqrt[3]{27}"),
        (r"2\sqrt[3]{2}", r"\sqrt[3]{16}"),
        ("-1.5", r"\sqrt[3]{-\frac{27}{8}}"),
        ("x^{1/3}", r"\sqrt[3]{x}"),
        ("-2", "∛(-8)"),
    ],
    "binomials": [
        ("10", r"\binom52"),
        ("10", r"{5\choose 2}"),
        ("10", r"\dbinom{5}{2}"),
        (r"\binom{n}{2}", r"{n \choose 2}"),
        (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        (r"\binom{2024}{2}\sqrt2", r"2047276\sqrt2"),
        (r"\binom{2024}{3}", r"\frac{2024\cdot2023\cdot2022}{6}"),
        (r"\binom{n}{k}", r"\frac{n!}{k!(n-k)!}"),
    ],
    "sums and products": [
        ("55", r"\sum_{k=1}^{10} k"),
        ("385", r"\sum_{k=1}^{10}k^2"),
        (r"\sum_{k=1}^{10}k^2", r"\sum_{i=1}^{10} i^2"),
        (r"\sum_{k=1}^{n}k", r"\sum_{k=1}^n k"),
        ("120", r"\prod_{k=1}^{5}k"),
        ("1.5", r"\sum_{k=1}^{2}\frac{1}{k}"),
    ],
    "vectors": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
        ("(1,2,3)", r"\begin{bmatrix}1\\2\\3\end{bmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\langle 1,2\rangle"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\overrightarrow{AB}", r"\vec{AB}"),
    ],
    "overlines": [
        (r"0.\overline{3}", r"0.\bar{3}"),
        ("1/3", "0.(3)"),
        ("1/3", r".\overline{3}"),
        ("1/3", r"0.\dot{3}"),
        ("4/33", r"0.\overline{12}"),
        (r"\frac{11}{30}", r"0.3\overline{6}"),
        (r"\overline{AB}", r"\bar{AB}"),
        ("1/6", r"0.1\bar6"),
        ("1/3", r"0.3\overline{3}"),
        (r"-0.\overline{3}", "-1/3"),
        (r"1.\overline{3}+\sqrt2", r"\frac43+\sqrt2"),
    ],
}
# form: pairs that differ
WRONG = {
    "mixed numbers": [
        ("1.8", "4/5"),
        ("14/5", "1 4/5"),
        ("1.8", "14/5"),
        ("1", "1 4/5"),
        ("0.8", "1 4/5"),
        (r"\frac45", "1 4/5"),
        ("3.5", "31/2"),
        ("3 1/2", "3"),
        ("3 1/2", "1/2"),
        ("3 1/2", "3/2"),
        ("3", "3½"),
        ("31/2", "3½"),
        ("4.25", "3 5/4"),
        ("8/3", "2 2 2/3"),
    ],
    "absolute values": [
        ("x", "abs(x)"),
        ("|x|", "x"),
        ("|x|", "-x"),
        ("|x-1|", "abs(x)-1"),
        ("|x|+1", "abs(x+1)"),
    ],
    "real numbers without a point": [
        (r"\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup[1,\infty)"),
        (r"\mathbb{R}\setminus\{1\}", r"(-\infty,2)\cup(2,\infty)"),
        (r"\mathbb{R}\setminus\{1\}", r"\mathbb{R}"),
        (r"\mathbb{R}\setminus\{1\}", "1"),
        (r"\mathbb{R}\setminus\{1,2\}", r"(-\infty,1)\cup(2,\infty)"),
        (r"\mathbb{R}\setminus\{1,2\}", r"\mathbb{R}\setminus\{1\}"),
        (r"\mathbb{R}\setminus[1,2]", r"\mathbb{R}\setminus\{1,2\}"),
        (r"\mathbb{R}\setminus\{1\}", r"\mathbb{Q}\setminus\{1\}"),
        (r"\mathbb{R}", r"[-\infty,\infty)"),
        (r"\mathbb{R}", r"(0,\infty)"),
        (r"\mathbb{R}", "R"),
        (r"(-\infty,1)\cup(1,\infty)", r"x\ne 2"),
        ("1", r"x\ne 1"),
        ("x=1", r"x\ne 1"),
        (r"\mathbb{N}", r"\mathbb{R}"),
        (r"\mathbb{R}\setminus(1,2)", r"\mathbb{R}\setminus\{1,2\}"),
        ("x-1", r"x \ne 1"),
    ],
    "repeated elements": [
        (r"\{1,1,2\}", r"\{1,2,2\}"),
        ("1,1,2", "1,2"),
        ("1,1,2", "1,2,2"),
        ("1,2", "1,1,2"),
        (r"\{1,2\}", r"\{1,1\}"),
        (r"\{1,2\}", "1,1,2"),
        (r"\{1\}", r"\{1,2\}"),
        (r"\{1,2\}", "(1,1,2)"),
    ],
    "or": [
        (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \text{ and } x>1"),
        (r"(-\infty,-1)\cup(1,\infty)", "x<-1 or y>1"),
        (r"(-\infty,-1)\cup(1,\infty)", r"x\le-1 or x>1"),
        (r"(1,2)\cup(3,4)", "(1,2),(3,4)"),
        ("(1,2),(3,4)", r"(1,2)\cup(3,4)"),
        (r"(-\infty,-1)\cup(1,\infty)", "x>1"),
        ("(-1,1)", "x>-1 or x<1"),
        (r"(-\infty,1)\cup(-1,\infty)", "x>-1, x<1"),
    ],
    "empty sets": [
        (r"\emptyset", "0"),
        (r"\emptyset", r"\{0\}"),
        (r"\emptyset", r"\{\emptyset\}"),
        (r"\{\emptyset\}", r"\emptyset"),
        (r"\emptyset", "()"),
        (r"\{\}", r"\{\{\}\}"),
        (r"\emptyset", r"\phi"),
        ("0", r"\{\}"),
    ],
    "odd roots": [
        ("2", r"\sqrt[3]{-8}"),
        ("-2", r"\sqrt[4]{-16}"),
        ("-2", r"\sqrt{-4}"),
        ("-2", r"\sqrt[3]{8}"),
        (r"\sqrt[3]{-2}", r"\sqrt[3]{2}"),
        ("-2", r"\sqrt[2]{-4}"),
        (r"1+i\sqrt3", r"\sqrt[3]{-8}"),
        ("x^{1/3}", r"\sqrt[5]{x}"),
        ("-4", r"\sqrt[3]{-8}^3"),
    ],
    "binomials": [
        ("20", r"{5\choose 2}"),
        ("10", r"{5\choose 1}"),
        ("10", r"{2\choose 5}"),
        ("2.5", r"{5\choose 2}"),
        ("7", "C(5,2)"),
        (r"\binom{n}{2}", r"\binom{2}{n}"),
        (r"2047277\sqrt2", r"\binom{2024}{2}\sqrt2"),
    ],
    "sums and products": [
        ("45", r"\sum_{k=1}^{10} k"),
        ("10", r"\sum_{k=1}^{10} k"),
        ("k", r"\sum_{k=1}^{10} k"),
        ("56", r"\sum_{k=1}^{10} k"),
        ("65", r"\sum_{k=1}^{10} k+1"),
        (r"\sum_{k=1}^{10}k^2", r"\sum_{k=1}^{11}k^2"),
        (r"\sum_{k=1}^{n}k", r"\sum_{k=1}^{n}k^2"),
        ("15", r"\prod_{k=1}^{5}k"),
    ],
    "vectors": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(2,1)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "[1,2]"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "(1,2,3,4)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "1,2"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\{1,2\}"),
        ("(1,2)", r"\begin{pmatrix}1\\2\\3\end{pmatrix}"),
        ("[1,2)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\vec{AB}", r"\vec{BA}"),
        (r"\vec{v}", r"\vec{w}"),
    ],
    "overlines": [
        ("0", "0.(3)"),
        ("1/3", "0.3"),
        ("0.3", r"0.\overline{3}"),
        ("1/3", r"0.\overline{33}4"),
        ("1/3", "0.(33)4"),
        (r"\overline{AB}", r"\overline{AC}"),
        ("4/33", r"0.\overline{21}"),
        ("3", r"\overline{3}"),
        ("0.9", r"0.\overline{9}"),
        ("7.5", "2.(53)"),
        ("12", r"\overline{12}"),
    ],
}


def outcome(gold, answer):
    return verify(rf"\boxed{{{answer}}}", {"answer": gold}).outcome


@pytest.mark.parametrize("form", RIGHT)
def test_the_same_answer_in_another_form(form):
    for one, other in RIGHT[form]:
        assert outcome(one, other) == "pass", (one, other)
        assert outcome(other, one) == "pass", (other, one)


@pytest.mark.parametrize("form", WRONG)
def test_no_form_makes_a_wrong_answer_right(form):
    for one, other in WRONG[form]:
        assert outcome(one, other) == "wrong", (one, other)
        assert outcome(other, one) == "wrong", (other, one)


def test_an_answer_may_name_the_elements_of_a_set_twice():
    assert outcome(r"\{1,2\}", r"\{1,1,2\}") == "pass"
    assert outcome(r"\{1,1,2\}", r"\{1,2\}") == "wrong"  # repeats in the gold answer may matter
    assert outcome(r"\{1,2\}", r"\{1,1,3\}") == "wrong"


@pytest.mark.parametrize(
    "answer",
    [
        r"\mathbb{R}\setminus\{\}",
        r"\mathbb{R}\setminus\{9^{9^{9}},1\}",
        r"\mathbb{R}\setminus\{x,y\}",
        r"\mathbb{R}\setminus\{(1,2)\}",
        r"x \ne y",
        r"\sum_{k=1}^{999999} k",
        r"\sum_{k=3}^{1} k",
        r"\sum_{k=1}^{10} k+1",
        "abs(x+|y|)",
        r"\sqrt[3]{-x}",
        r"\binom{99999}{9}+x",
        r"0.\overline{3}\overline{4}",
    ],
)
def test_what_is_not_worked_out_is_still_the_same_as_itself(answer):
    assert outcome(answer, answer) == "pass"
    assert outcome(answer, "5") == outcome("5", answer) == "wrong"
