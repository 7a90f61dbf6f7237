"""Answers that try to hang, exhaust or crash the mathematics verifier."""

import contextlib
import pathlib
import re
import time

import pytest

from lpo_jax import rewards
from lpo_jax.errors import UserError
from lpo_jax.rewards.limits import OutOfTime, cpu_limit

TOWER = "5^(5^(5^(5^5)))"


def nested(form, levels, inside="x"):
    for _ in range(levels):
        inside = form.replace("@", inside)
    return inside


PATHOLOGICAL = {
    "tower": TOWER,
    "tower in braces": "5^{5^{5^{5^{5}}}}",
    "tower of letters": "x^{x^{x^{x^{x}}}}",
    "tower under a root": rf"\sqrt{{2}}^{{{TOWER}}}",
    "tower in a sine": rf"\sin({TOWER})",
    "tower of e": nested("e^{@}", 30, "9"),
    "factorials": "9!!!!!!",
    "binomial": r"x + \binom{1000000000}{500000000}",
    "exponent": "1e999999999",
    "power of a sum": "(x+y+z+1)^{1000000}",
    "many digits": "9" * 1900,
    "many terms": "+".join(["1"] * 900),
    "many fractions": "+".join(rf"\frac{{1}}{{3^{{{9000 + i}}}}}" for i in range(100)),
    "many factorials": "+".join(["2999!/2998!"] * 150),
    "fractions in fractions": nested(r"\frac{1}{1+@}", 60),
    "roots in roots": nested(r"\sqrt{1+@}", 9),
    "parentheses": "(" * 900 + "x" + ")" * 900,
    "braces": "{" * 900 + "x" + "}" * 900,
    "bars": "|".join("x" * 90),
    "logarithms": r"\ln" * 20 + " 10",
    "floor": r"\lfloor (\sqrt{2}+\sqrt{3})^{2156} \rfloor",
    "roots, one hundred": ",".join(rf"\sqrt{{{n}}}" for n in range(2, 102)),
    "plus-minus": r"\pm" * 500 + "1",
    "functions that compute": r"\operatorname{eig}(x) + \int_0^1 x^{99999} dx + \sum_{k=1}^{10^{12}} k^9",
    "code": "__import__('os').system('true')",
    "garbage": "\x00\ud800\u202e{\\}\\frac\\sqrt^_&\\\\",
    "nothing": r"\frac{}{}",
}
SCORED = ("wrong", "timeout", "malformed")


def test_pathological_answers_are_scored_within_the_limit_by_the_same_worker():
    gold = ",".join(rf"\sqrt{{{n}}}" for n in range(101, 1, -1))
    good = [(r"\boxed{\sqrt8}", {"answer": r"2\sqrt2"}), (r"\boxed{\frac{x}{2}}", {"answer": r"\frac12 x"})]
    with rewards.VerifierPool("math", workers=1, timeout=20.0) as pool:
        pids = pool.pids
        for name, answer in PATHOLOGICAL.items():
            response = rf"\boxed{{{answer}}}"
            if name.startswith("garbage"):
                response = answer + r"\boxed{" + answer
            started = time.monotonic()
            for right in (r"\sqrt{2}", gold):
                (verdict,) = pool.verify([response], [{"answer": right}])
                if name != "roots, one hundred" or right != gold:
                    assert verdict.outcome in SCORED and verdict.reward == 0.0, (name, verdict)
            assert time.monotonic() - started < 20.0
        verdicts = pool.verify([response for response, _ in good], [example for _, example in good])
        assert [verdict.outcome for verdict in verdicts] == ["pass", "pass"]
        assert pool.pids == pids  # none was killed
        limit = re.search(r"Max data size +(\d+)", pathlib.Path(f"/proc/{pids[0]}/limits").read_text())
        assert int(limit[1]) == 2 << 30


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 100_000, "{" * 500_000, r"\boxed{1}" * 50_000 + "x", "}" * 500_000]
)
def test_finding_the_box_is_linear(text):
    started = time.monotonic()
    rewards.get("math")(text, {"answer": "2"})
    rewards.get("gsm8k")("#### " * 100_000 + text, {"answer": "2"})
    assert time.monotonic() - started < 10.0


def test_a_pool_gives_more_time_than_the_verifiers_own_limit():
    with pytest.raises(
        UserError, match=r"rewards\.timeout = 1: the math verifier needs at least 3 s.* masked"
    ):
        rewards.VerifierPool("math", workers=1, timeout=1.0)


def test_a_pathological_gold_answer_masks_nothing_and_passes_only_for_itself():
    verify = rewards.get("math")
    assert verify(rf"\boxed{{{TOWER}}}", {"answer": TOWER}).outcome == "pass"
    assert verify(r"\boxed{5}", {"answer": TOWER}).outcome == "wrong"


def test_cpu_limit_ends_work_that_catches_exceptions_and_leaves_no_timer():
    started = time.thread_time()
    with pytest.raises(OutOfTime, match=r"0.2 s of processor time"), cpu_limit(0.2):
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))
    assert 0.2 <= time.thread_time() - started < 1.0
    with cpu_limit(0.2):
        time.sleep(0.4)  # takes no processor time
    until = time.thread_time() + 0.4
    while time.thread_time() < until:
        pass
