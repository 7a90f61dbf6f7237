"""Types: `Any` stays rare, and the package declares that it has annotations. `make lint` runs mypy itself."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lpo_jax"
MOST = 30


def test_any_is_rare():
    """Counts every use of `Any` outside of imports, the aliases of `lpo_jax/types.py` included."""
    uses = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and node.id == "Any"
    ]
    assert len(uses) <= MOST, uses


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
