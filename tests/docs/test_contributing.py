"""CONTRIBUTING.md, the pre-commit settings and the workflow name commands and files that exist."""

import re
import tomllib
from pathlib import Path

import yaml

import lpo_jax
from lpo_jax import objectives as O

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def make_targets(text: str) -> set[str]:
    """The targets of `make` where a command stands: at the start of a line, or in backticks."""
    return set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M))


def test_commands_of_the_pages_exist():
    text = "\n".join((ROOT / page).read_text() for page in ("CONTRIBUTING.md", "README.md", "docs/index.md"))
    assert make_targets(text) and all(re.search(rf"^{name}:", MAKEFILE, re.M) for name in make_targets(text))
    for name in re.findall(r"\b(?:scripts|tests|docs|configs|benchmarks)/[\w/-]+\.\w+", text):
        assert (ROOT / name).exists(), name


def test_links_of_the_top_level_pages_lead_to_files():
    for page in ("CONTRIBUTING.md", "README.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / page).read_text()):
            assert (ROOT / target).exists(), (page, target)


def test_the_workflow_runs_make_on_the_oldest_python_and_newer_ones():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    runs = "\n".join(step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])
    assert make_targets(runs) == {"lint", "test", "docs"}
    pythons = [entry["python"] for entry in workflow["jobs"]["test"]["strategy"]["matrix"]["include"]]
    assert pythons[0] == PROJECT["requires-python"].removeprefix(">=") and "3.12" in pythons


def test_pre_commit_runs_what_make_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"] for hook in hooks]
    for command in ("ruff check", "ruff format --check", "mypy"):
        assert any(entry.startswith(f".venv/bin/{command}") for entry in entries)
        assert f"$(BIN)/{command}" in MAKEFILE
    for script in re.findall(r"scripts/\w+\.py", "\n".join(entries)):
        assert (ROOT / script).exists()


def test_the_readme_counts_the_methods():
    (count,) = re.findall(r"\b(\d+) group-based methods", (ROOT / "README.md").read_text())
    assert int(count) == len(O.names())


def test_both_versions_agree():
    assert PROJECT["version"] == lpo_jax.__version__
