import math
import pickle
import subprocess
import sys

import pytest

from lpo_jax import rewards
from lpo_jax.errors import UserError


def test_names():
    assert rewards.names() == [
        "arithmetic",
        "code",
        "countdown",
        "format",
        "geometry",
        "gsm8k",
        "math",
        "reasoning-gym",
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rewards.get("countdwn"), "did you mean 'countdown'"),
        (lambda: rewards.get("countdown", strct=True), "did you mean 'strict'"),
        (lambda: rewards.get("countdown", strict="yes"), "strict is 'yes', but must be of type bool"),
        (lambda: rewards.VerifierSpec("nothing-like-it"), "countdown"),
        (lambda: rewards.VerifierSpec("countdown", {"scores": [1]}), "three finite numbers"),
        (lambda: rewards.VerifierSpec("x.py:verify", {"a": 1}), "takes no options"),
        (lambda: rewards.load_function("verify"), "file.py:function"),
    ],
)
def test_wrong_names_and_options(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("returned", "reward", "outcome"),
    [
        (1.0, 1.0, "pass"),
        (1, 1.0, "pass"),
        (True, 1.0, "pass"),
        (0.25, 0.25, "wrong"),
        (rewards.Verdict(0.5, "pass"), 0.5, "pass"),
        (math.nan, 0.0, "infrastructure"),
        (-math.inf, 0.0, "infrastructure"),
        (10**400, 0.0, "infrastructure"),
        ("1.0", 0.0, "infrastructure"),
        (None, 0.0, "infrastructure"),
        (1j, 0.0, "infrastructure"),
        (rewards.Verdict(math.nan, "pass"), 0.0, "infrastructure"),
        (rewards.Verdict("1", "pass"), 0.0, "infrastructure"),
    ],
)
def test_as_verdict(returned, reward, outcome):
    verdict = rewards.as_verdict(returned)
    assert (verdict.reward, verdict.outcome) == (reward, outcome)
    assert type(verdict.reward) is float
    assert verdict.masked == (outcome == "infrastructure") == ("reason" in verdict.parts)


def test_as_verdict_takes_numpy_scalars():
    import numpy as np

    verdict = rewards.as_verdict(rewards.Verdict(np.float32(0.5), "wrong", {"n": np.int64(3), "why": None}))
    assert verdict == rewards.Verdict(0.5, "wrong", {"n": 3.0, "why": "None"})
    assert type(verdict.reward) is float and type(verdict.parts["n"]) is float


def test_verdict_refuses_other_outcomes():
    with pytest.raises(ValueError, match="passed"):
        rewards.Verdict(1.0, "passed")


def test_load_function(tmp_path, monkeypatch):
    (tmp_path / "helper.py").write_text("def score(text):\n    return len(text) / 10\n")
    file = tmp_path / "mine.py"
    file.write_text("import helper\n\ndef verify(response, example):\n    return helper.score(response)\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert rewards.load_function(f"{file}:verify")("12345", {}) == rewards.Verdict(0.5, "wrong")
    sys.modules.pop("helper")


def test_spec_is_plain_data_and_survives_a_change_of_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def verify(response, example):\n    return float(response == '<a>b')\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = rewards.VerifierSpec("mine.py:verify", prefill="<a>")
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert pickle.loads(pickle.dumps(spec)).load()("b", {}).outcome == "pass"
    assert spec.descriptor.fields == ()
    assert rewards.VerifierSpec("countdown").descriptor.fields == ("numbers", "target")


def test_import_is_light():
    heavy = ["jax", "grain", "numpy", "tensorflow_datasets", "transformers"]
    code = f"import sys, lpo_jax.rewards, lpo_jax.tasks; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
