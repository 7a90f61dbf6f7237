"""The run doctor on recorded runs: each sick one is named with its remedy, and nothing is found in healthy ones.

`scripts/record_runs.py` records runs. One sickness has no recording: the healthy run with its metric altered stands
for it.
"""

import re
from pathlib import Path

import pytest

from lpo_jax.json_lines import read_rows
from lpo_jax.reporting import doctor
from lpo_jax.reporting.doctor import CHECKS, Doctor, diagnose, name_of

RUNS = Path(__file__).parent / "golden" / "runs"
HEALTHY = ("healthy", "healthy-gspo", "healthy-quickstart")

# Words of the remedy of each diagnosis, and further diagnoses that its run has for the same reason.
REMEDIES = {
    "masked-responses": ("repair the verifier", ()),
    "truncated-responses": ("sampling.max_tokens", ("unreachable-pass",)),
    "groups-without-signal": ("dynamic-sampling", ()),
    "entropy-collapse": (
        "optimizer.learning_rate",
        ("truncated-responses", "groups-without-signal", "repetition", "unreachable-pass"),
    ),
    "repetition": ("repetitive", ("truncated-responses", "groups-without-signal", "gradient-spike")),
    "reward-without-passes": (
        "read the responses of highest reward",
        ("repetition", "truncated-responses", "heldout-falls", "groups-without-signal"),
    ),
    "heldout-falls": ("best checkpoint", ("truncated-responses",)),
    "sampler-gap": ("training.behaviour=rescored", ()),
    "gradient-spike": ("optimizer.clip_norm", ("heldout-falls",)),
    "score-spike": ("optimizer.learning_rate", ()),
    "nonfinite-gradients": ("optimizer.learning_rate", ("truncated-responses",)),
    "unreachable-pass": ("evaluation.score=reward", ()),
    "slow-verifier": ("rewards.workers", ()),
    "zero-learning-rate": ("optimizer.learning_rate", ()),
}


def recorded(name):
    """The rows of a run."""
    if name != "score-spike":
        return read_rows(RUNS / f"{name}.jsonl")
    rows = read_rows(RUNS / "healthy.jsonl")
    spike = lambda step: {"lpo/score_abs_max": 1.7 if step == 20 else 0.05}  # noqa: E731
    return [row | spike(row["step"]) if "actor/grad_norm" in row else row for row in rows]


def found(name):
    return {diagnosis.name: diagnosis for diagnosis in diagnose(recorded(name))}


def test_every_check_has_a_sick_run_and_a_line_in_the_docs():
    names = [name_of(check) for check in CHECKS]
    assert names == list(REMEDIES)
    page = Path(__file__).parents[2] / "docs" / "doctor.md"
    assert re.findall(r"^\| `([a-z-]+)` \|", page.read_text(), re.MULTILINE) == names


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_healthy_runs(name):
    assert found(name) == {}


@pytest.mark.parametrize("name", REMEDIES)
def test_sick_runs_are_named_with_their_remedy(name):
    remedy, others = REMEDIES[name]
    diagnoses = found(name)
    assert set(diagnoses) == {name, *others}
    diagnosis = diagnoses[name]
    line = diagnosis.line()
    assert remedy in diagnosis.remedy and diagnosis.evidence in line and "\n" not in line
    assert line.startswith(f"warning: {name} (step")


@pytest.mark.parametrize("name", REMEDIES)
def test_a_resumed_doctor_finds_the_same(name):
    rows = recorded(name)
    whole, middle = Doctor(), len(rows) // 2
    of_whole = [whole.observe(row) for row in rows]
    resumed = Doctor(rows[:middle])
    assert [resumed.observe(row) for row in rows[middle:]] == of_whole[middle:]


def test_rows_of_older_runs_and_missing_values_are_read():
    rows = [
        {"step": step, "actor/grad_norm": None, "nonfinite": {"actor/grad_norm": "nan"}} for step in range(60)
    ]
    assert diagnose(rows) == [] and diagnose([]) == []
    falling = [{"step": 0, "val-core/x/acc/pass@1": 0.5}, {"step": 9, "val-core/x/acc/pass@1": None}]
    assert diagnose([*falling, *rows[10:]]) == []
    assert doctor.Doctor(falling).observe(rows[10]) == []
