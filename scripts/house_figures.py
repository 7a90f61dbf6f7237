"""Figures of the package's structure: imports, names, sizes, types and docstrings.

    python scripts/house_figures.py NEW_CHECKOUT [OLD_CHECKOUT] [--docstrings 10 --seed SEED]

Prints lines of code (without docstrings, comments and blank lines), the count of `Any` in annotations, the longest
files and functions, imports against the order of rooms, import circles and names defined in two rooms. With
`--docstrings N --seed SEED` N public docstrings follow, drawn at random.

The functions are used by tests/house, which holds the bars. Nothing of the package is imported: its source is parsed.
"""

import argparse
import ast
import collections
import dataclasses
import functools
import io
import pathlib
import random
import sys
import tokenize
import tomllib
from collections.abc import Iterator, Mapping, Sequence

PACKAGE = "lpo_jax"
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


_parse = functools.lru_cache(maxsize=1000)(ast.parse)  # several tests read the whole package


@dataclasses.dataclass(frozen=True)
class Module:
    """A source file of the package: its dotted name, its room, its text and its syntax tree."""

    name: str
    path: pathlib.Path
    text: str = dataclasses.field(repr=False)

    @property
    def room(self) -> str:
        """The subpackage, or the file's own name where it is directly in the package."""
        return self.name.split(".")[1] if "." in self.name else ""

    @property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return _parse(self.text)


@dataclasses.dataclass(frozen=True, order=True)
class Import:
    """`importer` imports `imported` at `line`; both are dotted names of modules."""

    importer: str
    line: int
    imported: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def read_package(checkout: pathlib.Path) -> list[Module]:
    """All modules of the package in a checkout, sorted by name."""
    modules = []
    for path in sorted((checkout / PACKAGE).rglob("*.py")):
        parts = path.relative_to(checkout).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(name, path.relative_to(checkout), path.read_text()))
    return modules


def read_rooms(checkout: pathlib.Path) -> list[list[str]]:
    """The levels of rooms from the ground up, as pyproject.toml lists them ([tool.lpo_jax] rooms)."""
    with (checkout / "pyproject.toml").open("rb") as file:
        levels = tomllib.load(file).get("tool", {}).get(PACKAGE, {}).get("rooms", [])
    return [[level] if isinstance(level, str) else list(level) for level in levels]


def imports(modules: Sequence[Module]) -> list[Import]:
    """Imports between modules of the package, wherever they stand: at the top, in a function, or for types alone.

    A string that is the name of a module counts as well, since `importlib` and `python -m` take such strings. Importing
    a module also runs the `__init__` of its package; that does not count.
    """
    names = {module.name for module in modules}
    found = set()
    for module in modules:
        for node in ast.walk(module.tree):
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(module, node)
                targets = [
                    f"{base}.{alias.name}" if f"{base}.{alias.name}" in names else base
                    for alias in node.names
                ]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
                targets = [node.value]
            found |= {Import(module.name, node.lineno, t) for t in targets if t in names and t != module.name}
    return sorted(found)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.name.split(".")
    if module.path.name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *([node.module] if node.module else [])])


def upward(modules: Sequence[Module], levels: Sequence[Sequence[str]]) -> list[Import]:
    """Imports that point up the list of levels, or to another room of the same level.

    The package's own `__init__` is above all rooms, but every file may import it (for `__version__`). The files of the
    lowest level may import each other.

    Raises:
      ValueError: a room is in no level, or a level names a room that does not exist.
    """
    level_of = {room: number for number, level in enumerate(levels) for room in level}
    rooms = {module.name: module.room for module in modules}
    if unknown := set(rooms.values()) - {""} ^ level_of.keys():
        raise ValueError(f"pyproject.toml and the package differ in rooms: {', '.join(sorted(unknown))}")
    found = []
    for arrow in imports(modules):
        importer, imported = rooms[arrow.importer], rooms[arrow.imported]
        if importer == imported or "" in (importer, imported):
            continue
        above, below = level_of[importer], level_of[imported]
        if above < below or above == below > 0:
            found.append(arrow)
    return found


def circles(modules: Sequence[Module]) -> list[list[str]]:
    """Groups of modules each of which imports all others of its group, directly or through others."""
    arrows = collections.defaultdict(set)
    for arrow in imports(modules):
        arrows[arrow.importer].add(arrow.imported)
    reached = {module.name: _reach(module.name, arrows) for module in modules}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in reached
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def _reach(start: str, arrows: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for following in arrows.get(waiting.pop(), set()) - seen:
            seen.add(following)
            waiting.append(following)
    return seen


def repeated_names(modules: Sequence[Module]) -> dict[str, list[str]]:
    """Names of public classes and public top-level functions that several rooms define, with the modules that do."""
    defined: dict[str, list[Module]] = collections.defaultdict(list)
    for module in modules:
        for node in module.tree.body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                defined[node.name].append(module)
    return {
        name: [module.name for module in found]
        for name, found in sorted(defined.items())
        if len({module.room for module in found}) > 1
    }


def docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of all lines of docstrings, those of attributes included."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def code_lines(module: Module) -> int:
    """Lines that hold code: no docstring, no comment, not blank."""
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type not in layout:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(module.tree))


def functions(module: Module) -> Iterator[tuple[str, int]]:
    """(dotted name, lines without docstrings) of every function and method."""
    documented = docstring_lines(module.tree)

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}.{child.name}" if isinstance(child, Definition) else prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, len(set(range(child.lineno, child.end_lineno + 1)) - documented)
            yield from walk(child, name)

    yield from walk(module.tree, module.name)


def any_annotations(module: Module) -> list[tuple[int, str]]:
    """(line, text) of every annotation and type alias that contains `Any`."""
    found = []
    for node in ast.walk(module.tree):
        annotations = [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call | ast.Constant):
            annotations.append(node.value)
        for annotation in annotations:
            if isinstance(annotation, ast.AST) and any(
                isinstance(part, ast.Name) and part.id == "Any" for part in ast.walk(annotation)
            ):
                found.append((annotation.lineno, ast.unparse(annotation)))
    return found


def public_docstrings(modules: Sequence[Module]) -> list[tuple[str, str]]:
    """(dotted name, docstring) of every module, and of every public class, function and method that has one."""
    found = []

    def walk(node: ast.AST, name: str) -> None:
        if text := ast.get_docstring(node):
            found.append((name, text))
        if not isinstance(node, ast.Module | ast.ClassDef):
            return
        for child in node.body:
            if isinstance(child, Definition) and not child.name.startswith("_"):
                walk(child, f"{name}.{child.name}")

    for module in modules:
        walk(module.tree, module.name)
    return found


def main() -> int:
    """Print the figures of one or two checkouts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="+", type=pathlib.Path, metavar="CHECKOUT", help="new, then old")
    parser.add_argument("--docstrings", type=int, default=0, metavar="N", help="print N public docstrings")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (0)")
    parser.add_argument("--verbose", action="store_true", help="list what is counted")
    arguments = parser.parse_args()
    for checkout in arguments.checkouts:
        _print_figures(checkout, arguments.verbose)
    if arguments.docstrings:
        found = public_docstrings(read_package(arguments.checkouts[0]))
        for name, text in random.Random(arguments.seed).sample(found, arguments.docstrings):
            print(f"\n--- {name}\n{text}")
    return 0


def _print_figures(checkout: pathlib.Path, verbose: bool) -> None:
    modules, levels = read_package(checkout), read_rooms(checkout)
    arrows = upward(modules, levels) if levels else None
    rings, repeated = circles(modules), repeated_names(modules)
    annotations = [(module, *found) for module in modules for found in any_annotations(module)]
    long = sorted(((n, name) for module in modules for name, n in functions(module)), reverse=True)
    largest = max(modules, key=lambda module: module.text.count("\n"))
    rooms = {module.room for module in modules if module.path.parts[1:2] != (module.path.name,)}
    print(f"\n{checkout}")
    figures = {
        "lines of code": sum(map(code_lines, modules)),
        "files": len(modules),
        "rooms (subpackages)": len(rooms),
        "imports between modules": len(imports(modules)),
        "imports up the list of rooms": "no list of rooms" if arrows is None else len(arrows),
        "import circles": f"{len(rings)} ({sum(map(len, rings))} modules)",
        "names defined in two rooms": len(repeated),
        "annotations with Any": len(annotations),
        "of those, Any alone": sum(text in ("Any", "Any | None") for *_, text in annotations),
        "largest file": f"{largest.text.count(chr(10))} lines, {largest.path}",
        "longest function": "{} lines, {}".format(*long[0]),
    }
    for name, figure in figures.items():
        print(f"  {name:30} {figure}")
    if verbose:
        for arrow in arrows or ():
            print(f"  up: {arrow}")
        for ring in rings:
            print(f"  circle: {', '.join(ring)}")
        for name, where in repeated.items():
            print(f"  repeated: {name}: {', '.join(where)}")
        for module, line, text in annotations:
            print(f"  any: {module.path}:{line}: {text}")
        for lines, name in long:
            if lines > 60:
                print(f"  long: {lines} lines: {name}")


if __name__ == "__main__":
    sys.exit(main())
