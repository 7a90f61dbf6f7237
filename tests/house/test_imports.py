"""The import contract: rooms import only rooms below them, and no files import each other in a circle.

The order of rooms is the table [tool.lpo_jax] of pyproject.toml. The checks themselves are tested on small packages
that are written for the purpose.
"""

from pathlib import Path

import house_figures as house
import pytest

ROOT = Path(__file__).parents[2]
LEVELS = [["errors", "config"], ["ground"], ["left", "right"], ["top"]]
SOUND = {
    "__init__.py": "__version__ = '1'\ndef __getattr__(name):\n    from lpo_jax.top.run import run\n    return run\n",
    "errors.py": "",
    "config.py": "from lpo_jax.errors import UserError\n",
    "ground/__init__.py": "from lpo_jax.ground.maths import add\n",
    "ground/maths.py": "from lpo_jax import errors\n",
    "left/__init__.py": "",
    "left/walk.py": "from lpo_jax.ground import add\n",
    "right/__init__.py": "",
    "right/walk.py": "import lpo_jax.ground.maths\n",
    "top/__init__.py": "",
    "top/run.py": "from lpo_jax.left import walk\nfrom lpo_jax.right.walk import go\n",
}


@pytest.fixture
def package(tmp_path):
    """Write a package whose imports are sound, with the given lines added to its files, and read it."""

    def write(**added: str) -> list[house.Module]:
        for name, text in SOUND.items():
            path = tmp_path / house.PACKAGE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + added.pop(name.removesuffix(".py").replace("/", "_"), ""))
        assert not added
        return house.read_package(tmp_path)

    return write


@pytest.fixture(scope="module")
def lpo_jax():
    return house.read_package(ROOT)


def test_no_import_points_up_the_list_of_rooms(lpo_jax):
    found = house.upward(lpo_jax, house.read_rooms(ROOT))
    assert not found, "imports of a room above:\n" + "\n".join(map(str, found))


def test_no_files_import_each_other_in_a_circle(lpo_jax):
    found = house.circles(lpo_jax)
    assert not found, "\n".join("circle: " + ", ".join(circle) for circle in found)


def test_sound_imports_pass(package):
    modules = package()
    assert house.upward(modules, LEVELS) == house.circles(modules) == []


@pytest.mark.parametrize(
    "line",
    [
        "from lpo_jax.top.run import run",
        "from lpo_jax.top import run",
        "from lpo_jax import top",
        "import lpo_jax.top.run",
        "import lpo_jax.top.run as r",
        "from ..top import run",
        "from ..top.run import run as r",
        "def f():\n    from lpo_jax.top.run import run",
        "class A:\n    def f(self):\n        import lpo_jax.top.run",
        "import typing\nif typing.TYPE_CHECKING:\n    from lpo_jax.top.run import run",
        "import importlib\nr = importlib.import_module('lpo_jax.top.run')",
        "COMMAND = ('python', '-m', 'lpo_jax.top.run')",
        "from lpo_jax.right import walk",
    ],
)
def test_an_upward_import_is_found(package, line):
    (arrow,) = house.upward(package(left_walk=line), LEVELS)
    assert arrow.importer == "lpo_jax.left.walk"
    assert arrow.imported in ("lpo_jax.top", "lpo_jax.top.run", "lpo_jax.right.walk")


@pytest.mark.parametrize(
    "added, circle",
    [
        ({"errors": "from lpo_jax import config"}, ["lpo_jax.config", "lpo_jax.errors"]),
        ({"ground_maths": "from lpo_jax.ground import add"}, ["lpo_jax.ground", "lpo_jax.ground.maths"]),
        (
            {"ground_maths": "def f():\n    from lpo_jax.top import run"},
            [
                "lpo_jax.ground",
                "lpo_jax.ground.maths",
                "lpo_jax.left.walk",
                "lpo_jax.right.walk",
                "lpo_jax.top.run",
            ],
        ),
    ],
)
def test_a_circle_is_found(package, added, circle):
    assert house.circles(package(**added)) == [circle]


def test_every_room_is_in_the_list(package):
    with pytest.raises(ValueError, match="differ in rooms: right"):
        house.upward(package(), [["errors", "config"], ["ground"], ["left"], ["top"]])
    with pytest.raises(ValueError, match="differ in rooms: cellar"):
        house.upward(package(), [["cellar"], *LEVELS])
