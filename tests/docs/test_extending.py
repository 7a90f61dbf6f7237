"""The code of docs/extending.md, docs/index.md and the README runs as it stands on the page.

Each recipe runs in a process of its own, because it adds to the package's tables.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTENDING = (ROOT / "docs" / "extending.md").read_text()


def recipes() -> dict[str, str]:
    """The Python code of each section of the page, by heading."""
    sections = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", EXTENDING, re.M | re.S)
    return {
        heading: "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
        for heading, text in sections
    }


def run(code: str, folder: Path) -> str:
    """Run a script in `folder`, where configs/ is at hand; returns what it printed."""
    file = folder / "recipe.py"
    file.write_text(code)
    (folder / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, file.name], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("recipe", recipes())
def test_recipe(recipe, tmp_path):
    run(recipes()[recipe], tmp_path)


@pytest.mark.parametrize("page", ["docs/index.md", "README.md"])
def test_objectives_as_a_library(page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    (code,) = [block for block in blocks if "from lpo_jax import objectives" in block]
    printed = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert run(code, tmp_path).split("\n") == [*printed, ""]


def test_the_table_lists_every_recipe_and_its_files_exist():
    rows = dict(re.findall(r"^\| \[(.*?)\]\(#.*?\) \| .* \| (.*) \|$", EXTENDING, re.M))
    assert list(rows) == [heading[0].lower() + heading[1:] for heading in recipes()]
    for files in rows.values():
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", files):
            assert (ROOT / "lpo_jax" / name).exists(), name
