"""The geometry verifier: the paper's rewards, verl's, and the form of a response."""

import pytest

from lpo_jax import rewards
from lpo_jax.errors import UserError
from lpo_jax.rewards.geometry import well_formed

THOUGHT = "<think>The angles of a triangle add up to 180.</think>"
GOLD = {"answer": "3 \\sqrt { 2 }"}


@pytest.mark.parametrize(
    ("response", "outcome", "paper", "verl"),
    [
        (THOUGHT + " So x is \\boxed{3\\sqrt{2}}.", "pass", 1.0, 1.0),
        (THOUGHT + " \\boxed{\\sqrt{18}}", "pass", 1.0, 1.0),
        ("x is \\boxed{3\\sqrt{2}}", "pass", 1.0, 0.9),
        ("<think>It is \\boxed{3\\sqrt{2}}.</think>", "pass", 1.0, 0.9),
        (THOUGHT + " \\boxed{4.24}", "wrong", 0.1, 0.1),
        (THOUGHT + " \\boxed{3\\sqrt{3}}", "wrong", 0.1, 0.1),
        (THOUGHT + " \\boxed{3\\sqrt{2}", "malformed", 0.0, 0.0),
        (THOUGHT + " 3\\sqrt{2}", "malformed", 0.0, 0.0),
        ("So \\boxed{2}", "malformed", 0.0, 0.0),
        ("Look: " + THOUGHT + " \\boxed{2}", "malformed", 0.0, 0.0),
        ("<think>\\boxed{2}", "malformed", 0.0, 0.0),
        ("", "malformed", 0.0, 0.0),
    ],
)
def test_rewards(response, outcome, paper, verl):
    for name, reward in (("paper", paper), ("verl", verl)):
        verdict = rewards.get("geometry", rewards=name)(response, GOLD)
        assert (verdict.outcome, verdict.reward) == (outcome, reward)


def test_a_prefilled_thought_counts_and_an_empty_box_earns_nothing():
    verify = rewards.get("geometry", prefill="<think>")
    assert verify(" It is 7.</think> \\boxed{7}", {"answer": "7"}).reward == 1.0
    assert verify(" It is 8.</think> \\boxed{8}", {"answer": "7"}).reward == 0.1
    empty = verify(" Hm.</think> \\boxed{}", {"answer": "7"})
    assert (empty.outcome, empty.reward) == ("malformed", 0.0)


def test_an_answer_that_takes_too_long_is_not_masked():
    verdict = rewards.get("geometry")(THOUGHT + " \\boxed{9^{9^{9^9}}}", {"answer": "7"})
    assert verdict.outcome in ("wrong", "timeout") and verdict.reward == 0.1


def test_rows_whose_gold_answer_cannot_be_read_are_masked():
    assert rewards.get("geometry")(THOUGHT + " \\boxed{7}", {"answer": ""}).masked


def test_only_a_box_after_the_thought_is_the_form():
    assert well_formed("\n<think>a</think>\n\\boxed{1} and more")
    assert not well_formed("<think>a \\boxed{1}</think>")
    assert not well_formed("a</think>\\boxed{1}")


def test_unknown_rewards_are_refused():
    with pytest.raises(UserError, match="unknown rewards 'papers'; did you mean 'paper'"):
        rewards.get("geometry", rewards="papers")
