"""One name, one thing: public classes and functions of two rooms do not share a name."""

import sys
from pathlib import Path

import house_figures as house
import pytest

ROOT = Path(__file__).parents[2]

# The same kind of thing in several rooms, so that the common name helps.
SHARED: dict[str, str] = {
    "main": "entry point of a process",
    "get": "looks a name up in the registry of its room: objectives, rewards, tasks (public API)",
    "names": "lists the registry of its room: objectives, rewards, tasks (public API)",
}


def test_no_name_is_defined_in_two_rooms_for_two_things():
    repeated = house.repeated_names(house.read_package(ROOT))
    found = {name: modules for name, modules in repeated.items() if name not in SHARED}
    assert not found, "\n".join(f"{name}: {', '.join(modules)}" for name, modules in found.items())
    assert not SHARED.keys() - repeated.keys(), "no longer shared: remove it from the list"


def test_repeated_names_are_found(tmp_path):
    for room, text in {
        "one": "class Rows: ...\nclass _Own: ...\ndef _private(): ...\ndef join(): ...\nROWS = Rows\n",
        "two": "class Rows: ...\nclass _Own: ...\ndef _private(): ...\nclass A:\n    def join(self): ...\n",
    }.items():
        (tmp_path / house.PACKAGE / room).mkdir(parents=True)
        (tmp_path / house.PACKAGE / room / "a.py").write_text(text)
        (tmp_path / house.PACKAGE / room / "b.py").write_text("class Twice: ...\nclass Rows: ...\n")
    repeated = house.repeated_names(house.read_package(tmp_path))
    assert {name: len(modules) for name, modules in repeated.items()} == {"Rows": 4, "Twice": 2}


@pytest.mark.parametrize("folder", ["benchmarks", "scripts"])
def test_no_script_hides_a_standard_module(folder):
    """Python looks for modules in the folder of a script first, so its neighbours would break every import."""
    names = {path.stem for path in (ROOT / folder).glob("*.py")}
    assert names and not names & sys.stdlib_module_names
