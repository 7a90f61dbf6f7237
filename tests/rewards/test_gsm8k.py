import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpo_jax import rewards
from lpo_jax.errors import UserError

LONG = "\n" + "and so on " * 40  # more than the 300 characters that verl reads


def grade(response, mode="robust", gold="18", **options):
    return rewards.get("gsm8k", mode=mode, **options)(response, {"answer": gold})


# response, robust, strict, flexible; the last two are the scores of verl
CASES = [
    ("#### 18", True, True, True),
    ("she has 18.\n#### 18", True, True, True),
    ("####18", True, False, True),
    ("#### $18", True, False, True),
    ("#### 18.", True, False, False),
    ("#### 18.00", True, False, False),
    ("#### **18**", True, False, True),
    (r"#### \boxed{18}", True, False, True),
    (r"So $\boxed{18}$ dollars", True, False, True),
    ("#### 18 dollars", True, True, True),
    ("#### 18%", True, True, True),
    ("#### 3 * 6 = 18", True, False, True),
    ("#### Answer: 18", True, False, True),
    ("#### 36/2", True, False, False),
    (r"#### \frac{36}{2}", True, False, False),
    ("#### 18" + LONG, True, False, False),
    ("#### 17\n#### 18", True, True, True),
    ("#### Step 1: buy\nmore\n#### 18\n#### Step 2", True, True, False),
    ("the answer is 18", False, False, True),
    ("18", False, False, True),
    ("#### 19", False, False, False),
    ("#### -18", False, False, False),
    ("#### 180", False, False, False),
    ("#### 1.8", False, False, False),
    ("#### 18 or 19", False, True, False),
    ("#### 18-20", False, True, False),
    ("#### 1.8e1", False, False, False),
    ("#### 18\n#### 19", False, False, False),
    ("", False, False, False),
]


@pytest.mark.parametrize(("response", "robust", "strict", "flexible"), CASES)
def test_modes(response, robust, strict, flexible):
    for mode, expected in (("robust", robust), ("strict", strict), ("flexible", flexible)):
        assert grade(response, mode).reward == float(expected), mode


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("3 1/2", "3"),
        ("2 2/3", "2"),
        ("3½", "3"),
        ("1 234", "1"),
        ("12 34", "12"),
        ("\\boxed{3 1/2}", "3"),
        ("3*6", "36"),
        ("3\\times6", "36"),
        ("3\\cdot 6", "3"),
        ("\\sqrt{18}", "18"),
        ("√18", "18"),
        ("18~20", "1820"),
        ("18–20", "18"),
        ("18, 19", "18"),
        ("18²", "18"),
        ("18k", "18"),
        ("18 K", "18"),
        ("18.000,50", "18"),
        ("18(2)", "18"),
        ("18 x 2", "18"),
        ("3\\frac{1}{2}", "15.5"),
        ("3 thousand", "3"),
        ("3 and a half", "3"),
        ("18\\sqrt{2}", "18"),
        ("1_000", "1"),
        ("1'000", "1"),
        ("18." + "0" * 300 + "1", "18"),
        ("18\\pi", "18"),
        ("–18", "18"),
        ("3.5.2", "3.5"),
        ("18 and 19", "18"),
        ("$3$4", "34"),
        ("18٣", "18"),
        ("٣18", "18"),
        ("3 5/2", "3"),
        ("-2 1/2", "-1.5"),
        ("1\u202f234", "1"),
        ("18;19", "18"),
        ("18...20", "18"),
        ("2^{3}", "2"),
        ("18 / 1 2", "18"),
        ("2 1/2 3", "2.5"),
    ],
)
def test_a_part_of_a_number_is_not_the_number(answer, gold):
    for response in (f"#### {answer}", rf"\boxed{{{answer}}}"):
        assert grade(response, gold=gold).outcome != "pass"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("3 1/2", "3.5"),
        ("3½", "7/2"),
        ("½", "0.5"),
        ("-2 1/2", "-2.5"),
        ("3\\frac{1}{2}", "3.5"),
        ("1\\,000", "1000"),
        ("1{,}000", "1000"),
        ("1,\\!000", "1000"),
        ("18 \\text{ dollars}", "18"),
        ("$\\$18$", "18"),
        ("-\\$5.50", "-5.5"),
        ("18\\%", "18"),
        ("18\\\\", "18"),
        ("≈ 18", "18"),
        ("\\approx 18", "18"),
        ("=> 18", "18"),
        ("答案：18", "18"),
        ("18 (6 x 3)", "18"),
        ("18 dollars", "18"),
        ("\\textbf{18}", "18"),
        ("18 quarters", "18"),
        ("18.", "18"),
        ("–18", "-18"),
        ("1⁄2", "0.5"),
        ("2 2/3", "2 2/3"),
        ("18 to his friends", "18"),
        ("18 over budget", "18"),
        ("18 and done", "18"),
        ("$18.", "18"),
        ("18/hour", "18"),
        ("$18 - done", "18"),
    ],
)
def test_mixed_numbers_and_what_may_stand_around_a_number(answer, gold):
    assert grade(f"#### {answer}", gold=gold).outcome == "pass"
    assert grade(f"#### {answer}", gold="7").outcome == "wrong"


def test_thousands():
    assert grade("#### 1,000", gold="1000").outcome == "pass"
    assert grade("#### 1,000", "strict", gold="1000").outcome == "pass"
    assert grade("#### 1,000", "flexible", gold="1000").outcome == "wrong"  # verl keeps the comma here
    assert grade("#### 1,00", gold="100").outcome == "malformed"
    assert grade("#### -$5.50", gold="-5.5").outcome == "pass"


@pytest.mark.parametrize(
    "gold", ["18", 18, 18.0, "18.0", "She sells 18.\n#### 18", "#### 1,8".replace(",", "")]
)
def test_gold_answers_as_numbers_and_as_whole_solutions(gold):
    assert grade("#### 18", gold=gold).outcome == "pass"
    assert grade("#### 19", gold=gold).outcome == "wrong"


@pytest.mark.parametrize("gold", ["", "unknown", "####", "1/0", "2 or 3"])
@pytest.mark.parametrize("mode", ["robust", "strict", "flexible"])
def test_a_gold_answer_that_is_no_number_never_passes(gold, mode):
    for response in ("#### 18", "", "#### " + gold):
        verdict = grade(response, mode, gold=gold)
        assert verdict.outcome == "infrastructure" and "gold answer" in verdict.parts["reason"]


def test_outcomes_and_scores():
    assert grade("#### 19", format_score=0.1) == rewards.Verdict(0.1, "wrong", {"answer": "19"})
    assert grade("no idea", format_score=0.1).outcome == "malformed"
    assert grade("no idea", format_score=0.1).reward == 0.0
    assert grade("#### 18", format_score=0.1).reward == 1.0


def test_options():
    with pytest.raises(UserError, match="mode is one of robust, strict, flexible"):
        rewards.get("gsm8k", mode="lenient")
    with pytest.raises(UserError, match="finite"):
        rewards.get("gsm8k", format_score=float("nan"))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9), st.text(max_size=400), st.booleans())
def test_numbers_in_any_spelling_after_any_text(value, other, text, commas):
    spelling = f"{value:,}" if commas else f"{value}.0"
    response = f"{text}\n#### {spelling}"
    assert grade(response, gold=str(value)).outcome == "pass"
    assert grade(response, gold=str(other)).outcome == ("pass" if other == value else "wrong")
