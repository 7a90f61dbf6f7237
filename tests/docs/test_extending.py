"""The code of docs/extending.md, docs/index.md and the README runs as it stands on the page.

Each recipe runs in a process of its own, because it adds to the package's tables.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTENDING = (ROOT / "docs" / "extending.md").read_text()


def recipes() -> dict[str, str]:
    """The sections of the page, by heading."""
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", EXTENDING, re.M | re.S))


def blocks(text: str) -> list[str]:
    """The Python code of a text."""
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def patched(diffs: list[str], folder: Path) -> None:
    """Copy the package into `folder` and apply the page's diffs to it.

    A hunk is replaced where its lines stand together in the file, which must be exactly one place.
    """
    shutil.copytree(ROOT / "lpo_jax", folder / "lpo_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for diff in diffs:
        header, *hunks = re.split(r"^@@.*\n", diff, flags=re.M)
        path = folder / header.removeprefix("--- ").strip()
        text = path.read_text()
        for hunk in hunks:
            lines = [(line[:1], line[1:]) for line in hunk.splitlines(keepends=True)]
            old = "".join(line for sign, line in lines if sign != "+")
            assert text.count(old) == 1, f"{path.name} does not hold once:\n{old}"
            text = text.replace(old, "".join(line for sign, line in lines if sign != "-"))
        path.write_text(text)


def run(parts: list[str], folder: Path) -> str:
    """Run code in `folder`, where configs/ is at hand: parts that begin with the name of a file are written to it.

    Returns:
      What was printed.
    """
    script = folder / "script.py"
    for code in parts:
        name = re.match(r"# ([\w/]+\.py)\n", code)
        (folder / name[1] if name else script).open("a").write(code)
    (folder / "configs").symlink_to(ROOT / "configs")
    package = folder if (folder / "lpo_jax").exists() else ROOT
    environment = os.environ | {"PYTHONPATH": str(package)}
    command = [sys.executable, script.name]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("A hook", "A model family", "A divergence")
        else name
        for name in recipes()
    ],
)
def test_recipe(recipe, tmp_path):
    text = recipes()[recipe]
    if diffs := re.findall(r"^```diff\n(.*?)^```", text, re.M | re.S):
        patched(diffs, tmp_path)
    run(blocks(text), tmp_path)


@pytest.mark.parametrize("page", [pytest.param("docs/index.md", marks=pytest.mark.slow), "README.md"])
def test_objectives_as_a_library(page, tmp_path):
    (code,) = [x for x in blocks((ROOT / page).read_text()) if "from lpo_jax import objectives" in x]
    printed = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert run([code], tmp_path).split("\n") == [*printed, ""]


def test_each_addition_to_a_family_changes_at_most_two_files():
    diffs = re.findall(r"^```diff\n--- lpo_jax/(.*?)\n(.*?)^```", recipes()["A model family"], re.M | re.S)
    for name in ("attn_out_norm", "w_attn_gate", "attention_multiplier"):
        assert 1 <= sum(name in hunks for _, hunks in diffs) <= 2


def test_the_table_lists_every_recipe_and_its_files_exist():
    rows = dict(re.findall(r"^\| \[(.*?)\]\(#.*?\) \| .* \| (.*) \|$", EXTENDING, re.M))
    assert list(rows) == [heading[0].lower() + heading[1:] for heading in recipes()]
    for files in rows.values():
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", files):
            assert (ROOT / "lpo_jax" / name).exists(), name
