"""Failures of the verifier are counted and explained, cause a warning, and stop a run that has no other verdicts."""

import pytest

from lpo_jax.errors import RunStopped, VerifierFailed
from lpo_jax.rewards import Verdict
from lpo_jax.rewards.verdict import infrastructure
from lpo_jax.rollout.failures import QUIET, Failures, Watch, failures, require_judged, warning

PASS, WRONG, TIMEOUT = Verdict(1.0, "pass"), Verdict(0.0, "wrong"), Verdict(0.0, "timeout")


def test_counts_and_reasons():
    found = failures([PASS, infrastructure("a"), infrastructure("b"), WRONG, infrastructure("b"), TIMEOUT])
    assert found == Failures(6, {"a": 1, "b": 2})
    assert found.masked == 3 and found.share == 0.5 and found.reason == "b"
    assert failures([]) == Failures(0, {}) and failures([]).share == 0 and failures([]).reason == ""
    assert failures([Verdict(0.0, "infrastructure")]).reason == "no reason was given"


def test_a_run_stops_where_nothing_was_judged():
    with pytest.raises(VerifierFailed, match=r"step 3: .* all 2 responses.*: why \(t\.py, line 4\)"):
        require_judged(failures([infrastructure("why (t.py, line 4)")] * 2), "step 3")
    assert issubclass(VerifierFailed, RunStopped)  # exit status 1
    require_judged(failures([infrastructure("why")] * 99 + [WRONG]), "step 3")
    require_judged(failures([]), "step 3")


@pytest.mark.parametrize("masked, warned", [(0, False), (5, False), (6, True), (99, True)])
def test_a_warning_above_five_percent(masked, warned):
    message = warning(failures([infrastructure("why")] * masked + [WRONG] * (100 - masked)), "step 3")
    assert (message is not None) == warned
    if warned:
        assert message == (
            f"warning: step 3: the verifier failed on {masked} of 100 responses, which are masked; most often: why"
        )


def test_a_warning_is_not_repeated_at_every_step():
    watch, bad = Watch(), failures([infrastructure("why"), WRONG])
    lines = [watch.check(bad, f"step {i}") for i in range(2 * QUIET + 1)]
    assert [i for i, line in enumerate(lines) if line] == [0, QUIET, 2 * QUIET]
    assert watch.check(failures([infrastructure("another"), WRONG]), "step 4")  # a new reason
    assert watch.check(failures([WRONG]), "step 5") is None
    with pytest.raises(VerifierFailed):
        watch.check(failures([infrastructure("why")]), "step 6")
