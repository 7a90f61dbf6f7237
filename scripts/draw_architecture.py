"""Draw the rooms of the package and the imports between them: docs/architecture.svg.

    python scripts/draw_architecture.py [--check]

The imports are read from the source. The picture lists them in its description, so that `--check` (and
`tests/docs/test_architecture.py`) can compare it to the code without drawing.
"""

import argparse
import re
import sys
from pathlib import Path
from xml.sax.saxutils import unescape

import house_figures as house

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"

# The rooms that a response passes through on the way from the prompt to the gradient, in order (docs/architecture.md).
ROAD = ("tasks", "rollout", "sampling", "models", "rewards", "objectives", "training")


def rooms(root: Path = ROOT) -> list[list[str]]:
    """The levels of rooms from the ground up. The modules of the lowest level are drawn as one box."""
    return house.read_rooms(root)


def edges(root: Path = ROOT) -> list[tuple[str, str]]:
    """Pairs (importer, imported) of rooms, sorted.

    The modules of the lowest level count as one room, `ground`. Imports by and of the package's own `__init__` are left
    out.
    """
    modules = house.read_package(root)
    ground = set(rooms(root)[0])
    room = {module.name: "ground" if module.room in ground else module.room for module in modules}
    found = {(room[x.importer], room[x.imported]) for x in house.imports(modules)}
    return sorted(edge for edge in found if len(set(edge)) == 2 and "" not in edge)


def description(found: list[tuple[str, str]]) -> str:
    """The edges as one line of text."""
    return "; ".join(f"{importer} imports {imported}" for importer, imported in found)


def drawn() -> str:
    """The description in the committed picture."""
    match = re.search(r"<dc:description>(.*?)</dc:description>", PICTURE.read_text(), re.S)
    return unescape(match[1].strip()) if match else ""


def draw(path: Path) -> None:
    """Write the picture: a row for each room, marked in the columns of the rooms that it imports.

    Rows and columns follow the order of rooms, so an import that points up would be marked to the left of the diagonal,
    in red.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lpo_jax", "font.family": "sans-serif"}
    from matplotlib import pyplot as plt

    order = ["ground", *(room for level in rooms()[1:] for room in level)][::-1]
    place = {room: i for i, room in enumerate(order)}
    figure, axes = plt.subplots(figsize=(7.2, 6))
    for room, i in place.items():
        step = f"  ({ROAD.index(room) + 1})" if room in ROAD else ""
        weight, color = ("bold", "#364fc7") if step else ("normal", "#212529")
        axes.text(-0.8, i, room + step, ha="right", va="center", fontsize=10, weight=weight, color=color)
        axes.text(i, -0.8, room, ha="left", va="bottom", rotation=45, rotation_mode="anchor", fontsize=10)
        axes.plot(i, i, "s", ms=15, color="#dee2e6")
    for importer, imported in edges():
        y, x = place[importer], place[imported]
        axes.plot(x, y, "s", ms=15, color="#4c6ef5" if x > y else "#e03131")
    axes.set_xticks([i - 0.5 for i in range(len(order) + 1)])
    axes.set_yticks([i - 0.5 for i in range(len(order) + 1)])
    axes.grid(color="#e9ecef", lw=0.8)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_aspect("equal")
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(path, metadata={"Date": None, "Description": description(edges())}, bbox_inches="tight")
    plt.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def main() -> int:
    """Draw, or compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="draw nothing; fail if the picture is out of date"
    )
    if parser.parse_args().check:
        if drawn() != description(edges()):
            print(
                "docs/architecture.svg is out of date; run: python scripts/draw_architecture.py",
                file=sys.stderr,
            )
            return 1
        return 0
    draw(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
