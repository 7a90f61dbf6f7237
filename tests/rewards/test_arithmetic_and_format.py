import pytest

from lpo_jax import rewards
from lpo_jax.errors import UserError

ARITHMETIC = {
    "tagged": ("<answer> 19 </answer>", "pass"),
    "last tagged": ("<answer>3</answer> no, <answer>19</answer>", "pass"),
    "tag before number": ("<answer>18</answer> 19", "wrong"),
    "explicit plus": ("<answer>+19</answer>", "pass"),
    "words in the tag": ("<answer>it is 19</answer>", "malformed"),
    "float in the tag": ("<answer>19.0</answer>", "malformed"),
    "unicode digits": ("<answer>١٩</answer>", "malformed"),
    "expression": ("<answer>12+7</answer>", "malformed"),
    "unclosed tag": ("<answer>19", "malformed"),
    "last number": ("12 + 7 is 19.", "pass"),
    "another last number": ("19, or 20", "wrong"),
    "not a tail of a float": ("it is 0.19", "malformed"),
    "not a tail of a word": ("x19", "malformed"),
    "minus between numbers is no sign": ("38-19", "pass"),
    "nothing": ("", "malformed"),
    "5,000 digits": ("<answer>" + "1" * 5000 + "</answer>", "malformed"),
}


@pytest.mark.parametrize("case", ARITHMETIC)
def test_arithmetic(case):
    response, outcome = ARITHMETIC[case]
    verdict = rewards.get("arithmetic")(response, {"answer": 19})
    assert (verdict.outcome, verdict.reward) == (outcome, float(outcome == "pass"))


@pytest.mark.parametrize(
    ("response", "gold"), [("-1,234", "-1234"), ("-1234", "-1,234"), ("is -1234", -1234)]
)
def test_arithmetic_signs_and_commas(response, gold):
    assert rewards.get("arithmetic")(response, {"answer": gold}).outcome == "pass"
    assert rewards.get("arithmetic")(response.replace("-", ""), {"answer": gold}).outcome == "wrong"


def test_arithmetic_misplaced_commas_are_no_integer():
    assert rewards.get("arithmetic")("<answer>1,9</answer>", {"answer": 19}).outcome == "malformed"


FORMAT = {
    "as asked": ("<think>a</think><answer>b</answer>", True),
    "whitespace around": (" <think>\na\n</think>\n\n<answer>\nb\n</answer>\n", True),
    "no think": ("<answer>b</answer>", False),
    "wrong order": ("<answer>b</answer><think>a</think>", False),
    "answer inside think": ("<think>a<answer>b</answer></think>", False),
    "interleaved": ("<think>a<answer></think>b</answer>", False),
    "closed before opened": ("</think>a<think><answer>b</answer>", False),
    "text before": ("Well: <think>a</think><answer>b</answer>", False),
    "text between": ("<think>a</think> so <answer>b</answer>", False),
    "text after": ("<think>a</think><answer>b</answer>!", False),
    "empty answer": ("<think>a</think><answer> </answer>", False),
    "two answers": ("<think>a</think><answer>b</answer><answer>b</answer>", False),
    "nothing": ("", False),
}


@pytest.mark.parametrize("case", FORMAT)
def test_format(case):
    response, good = FORMAT[case]
    verdict = rewards.get("format")(response, {})
    assert (verdict.reward, verdict.outcome) == ((1.0, "pass") if good else (0.0, "malformed"))


def test_format_sees_prefill_and_response():
    response = "a</think><answer>b</answer>"
    assert rewards.get("format")(response, {}).reward == 0.0
    assert rewards.get("format", prefill="<think>")(response, {}).reward == 1.0


def test_format_tags():
    verify = rewards.get("format", tags=["plan", "code", "test"])
    assert verify("<plan>a</plan><code>b</code><test>c</test>", {}).reward == 1.0
    assert verify("<plan>a</plan><test>c</test><code>b</code>", {}).reward == 0.0


@pytest.mark.parametrize("tags", [[], ["a", "a"], ["<b>"], 5, "think"])
def test_format_bad_tags(tags):
    with pytest.raises(UserError, match="different words"):
        rewards.get("format", tags=tags)
