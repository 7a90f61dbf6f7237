"""Packages that programs may import: none by default, installed ones by name, and the message if an import fails."""

import os

import numpy as np
import pytest

from lpo_jax import rewards
from lpo_jax.errors import UserError
from lpo_jax.rewards import packages, sandbox
from lpo_jax.rewards.sandbox import Sandbox

MISSING = {kind: sandbox.why_not(kind) for kind in sandbox.KINDS}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(reason), reason=f"no {kind} sandbox here: {reason}"))
    for kind, reason in MISSING.items()
]
SOLVE = "import numpy as np\nprint(int(np.linalg.solve([[2, 1], [1, 3]], np.array(input().split(), float)).sum()))"


def judge(kind, program, **options):
    tests = {"inputs": ["3 4", "6 8"], "outputs": ["2", "4"]}
    return rewards.get("code", sandbox=kind, **options)(f"```python\n{program}\n```", {"tests": tests})


@pytest.mark.parametrize("kind", KINDS)
def test_without_packages_the_reason_says_how_to_make_one_available(kind):
    verdict = judge(kind, SOLVE)
    assert (verdict.reward, verdict.outcome) == (0.0, "wrong")
    assert verdict.parts["reason"] == (
        "test 1: ModuleNotFoundError: No module named 'numpy': programs can import the standard library and the "
        "packages in task.verifier_options.packages, such as [numpy]"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_installed_package_is_there_by_name(kind):
    tests = {"inputs": ["3 4", "6 8"], "outputs": ["2", "4"]}
    spec = rewards.VerifierSpec("code", {"packages": ["numpy"], "sandbox": kind})
    with rewards.VerifierPool(spec, workers=1, timeout=20.0, allow_weak_sandbox=True) as pool:
        (verdict,) = pool.verify([f"```python\n{SOLVE}\n```"], [{"tests": tests}])
    assert verdict.outcome == "pass", verdict
    program = (
        "import numpy, os, threading\nprint(numpy.__version__, threading.active_count())\n"
        "print(numpy.random.default_rng(0).integers(10))\n"
        "import yaml"  # also installed, but not named
    )
    with Sandbox(kind, program, packages=("numpy",)) as running:
        report = running.run("", seconds=20)
    assert report.output.decode().split() == [np.__version__, "1", str(np.random.default_rng(0).integers(10))]
    if kind == "bubblewrap":
        assert report.detail.endswith("such as [numpy, yaml]")


def test_bubblewrap_shows_packages_alone_and_read_only():
    if MISSING["bubblewrap"]:
        pytest.skip(MISSING["bubblewrap"])
    program = (
        "import numpy, os\nprint(numpy.__file__)\nprint(*os.listdir('/packages'))\n"
        "for path in (numpy.__file__, '/packages/x'):\n"
        "    try:\n        open(path, 'w')\n    except OSError as error:\n        print(error.strerror)"
    )
    with Sandbox("bubblewrap", program, packages=("numpy",)) as running:
        file, shown, *refused = running.run("", seconds=20).output.decode().splitlines()
    assert file == "/packages/numpy/__init__.py"
    assert {entry.partition(".")[0].partition("-")[0] for entry in shown.split()} == {"numpy"}
    assert len(refused) == 2 and "File" not in refused


def test_what_a_package_requires_comes_with_it():
    names = {os.path.basename(path) for path in packages.installed_paths("jinja2")}
    assert {"jinja2", "markupsafe"} <= names and not any(name.startswith(("numpy", "jax")) for name in names)
    found = packages.installed_paths("yaml")  # the distribution is PyYAML
    (path,) = [path for path in found if path.endswith("/yaml")]
    assert os.path.isfile(f"{path}/__init__.py")
    assert packages.installed_paths("math") == packages.installed_paths() == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["no_such_package_here"], "packages names 'no_such_package_here', which is not installed"),
        (["scikit-learn"], "use its import name"),
        (["numpy.linalg"], "use its import name"),
        ("numpy", "must be a list of names"),
        ([1], "must be a list of names"),
        (None, "must be a list of names"),
    ],
)
def test_a_name_that_is_no_installed_package_is_refused_at_once(value, message):
    with pytest.raises(UserError, match=message) as error:
        rewards.VerifierSpec("code", {"packages": value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_that_cannot_be_imported_there_is_refused_before_the_run(kind, tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_module_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    packages.installed_paths.cache_clear()
    spec = rewards.VerifierSpec("code", {"packages": ["broken_package"], "sandbox": kind})
    with pytest.raises(UserError, match=r"package broken_package cannot be imported by .*no_such_module"):
        rewards.VerifierPool(spec, workers=1, timeout=10.0, allow_weak_sandbox=True)
    packages.installed_paths.cache_clear()
