"""docs/architecture.md agrees with the code: rooms, the road of a response, records, and the picture of imports."""

import re
from pathlib import Path

import draw_architecture as drawing

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
LEVELS = drawing.rooms()


def section(heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]


def test_the_table_lists_the_rooms_in_their_order():
    rows = re.findall(r"^\| (.*?) \| .* \| `(.*)` \|$", section("Rooms"), re.M)
    listed = [re.findall(r"`(\w+)`", name) for name, _ in rows]
    assert listed == [[], *LEVELS[1:]]
    for _, file in rows:
        assert (ROOT / "lpo_jax" / file).exists(), file


def test_a_response_passes_through_at_most_seven_rooms_once_each():
    road = re.findall(r"^\d+\. \*\*(\w+)\*\*", section("The road of a response"), re.M)
    assert tuple(road) == drawing.ROAD
    assert len(road) == len(set(road)) <= 7
    assert set(road) <= {room for level in LEVELS for room in level}


def test_functions_and_files_of_the_road_exist():
    for file, name in re.findall(r"`([\w/]+\.py)(?:: (\w+))?`", section("The road of a response")):
        text = (ROOT / "lpo_jax" / file).read_text()
        assert not name or re.search(rf"^def {name}\(", text, re.M), (file, name)


def test_records_are_defined_in_their_rooms():
    records = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", section("Records"), re.M)
    assert len(records) == 8
    for record, room in records:
        texts = [path.read_text() for path in (ROOT / "lpo_jax" / room).rglob("*.py")]
        assert any(re.search(rf"^(class {record}\b|{record} = )", text, re.M) for text in texts), record


def test_the_picture_shows_the_imports_of_today():
    assert drawing.drawn() == drawing.description(drawing.edges()), "run: python scripts/draw_architecture.py"


def test_the_picture_lists_every_import_between_rooms_once(tmp_path):
    files = {"low/a.py": "", "high/b.py": "from lpo_jax.low import a\n", "config.py": "", "__init__.py": ""}
    files["high/c.py"] = "def f():\n    from lpo_jax.low.a import x\n    from lpo_jax import config\n"
    for name, text in files.items():
        path = tmp_path / "lpo_jax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pyproject.toml").write_text('[tool.lpo_jax]\nrooms = [["config"], "low", "high"]\n')
    assert drawing.edges(tmp_path) == [("high", "ground"), ("high", "low")]
    assert drawing.description(drawing.edges(tmp_path)) == "high imports ground; high imports low"
