"""MkDocs hook: generates the pages of the API reference, one for each package.

A page lists the public modules of its package, and mkdocstrings renders their docstrings. The pages exist only while
the site is built (`make docs`); `tests/docs/test_reference.py` compares them to the modules without building it.
"""

import ast
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lpo_jax"

# Pages outside docs/ that belong to the site: file, page, title.
_TOP_LEVEL = (
    ("CONTRIBUTING.md", "contributing.md", "Contributing"),
    ("CHANGELOG.md", "changelog.md", "Changelog"),
)


def modules() -> dict[str, Path]:
    """Public modules by dotted name: no part of the name begins with an underscore."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = path
    return found


def pages() -> dict[str, list[str]]:
    """The modules of each page, by the page's path in the site.

    A package of `lpo_jax` has a page of its own; the modules directly in `lpo_jax` share the page `ground.md`.
    """
    listed: dict[str, list[str]] = {}
    for name in modules():
        room = name.split(".")[1] if name.count(".") else ""
        page = room if (PACKAGE / room).is_dir() and room else "ground"
        listed.setdefault(f"reference/{page}.md", []).append(name)
    return listed


def public_names(path: Path) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The definitions of public classes and functions in a module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(
            node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and not node.name.startswith("_"):
            yield node


def markdown(page: str) -> str:
    """The source of one page."""
    title = Path(page).stem
    heading = "Modules of `lpo_jax` itself" if title == "ground" else f"`lpo_jax.{title}`"
    return f"# {heading}\n\n" + "\n\n".join(f"::: {name}" for name in pages()[page]) + "\n"


def on_config(config):
    """Add the generated pages to the navigation."""
    config.nav.append({"API reference": [{Path(page).stem: page} for page in pages()]})
    config.nav.extend({title: page} for _, page, title in _TOP_LEVEL)
    config.watch.append(str(PACKAGE))
    return config


def on_files(files, config):
    """Add the generated pages to the files of the site."""
    from mkdocs.structure.files import File

    for page in pages():
        files.append(File.generated(config, page, content=markdown(page)))
    for source, page, _ in _TOP_LEVEL:
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, **_):
    """Turn links into the repository into links within the site.

    `../lpo_jax/models/load.py` becomes the module's entry in the API reference, `docs/tasks.md` (in pages from the top
    level) becomes `tasks.md`.
    """
    depth = "../" * page.file.src_uri.count("/")
    names = {path.relative_to(ROOT).as_posix(): name for name, path in modules().items()}
    page_of = {name: listed for listed, held in pages().items() for name in held}

    def link(found: re.Match) -> str:
        name = names.get(found[1])
        return f"]({depth}{page_of[name]}#{name})" if name else found[0]

    markdown = re.sub(r"\]\((?:\.\./)*(lpo_jax/[\w/]+\.py)\)", link, markdown)
    for source, target, _ in _TOP_LEVEL:
        markdown = markdown.replace(f"]({source})", f"]({depth}{target})")
    return re.sub(r"\]\(docs/", f"]({depth}", markdown)


def on_post_build(config):
    """Fail where a public name is missing from the inventory of the site that was built.

    Raises:
      PluginError: naming the missing ones.
    """
    from mkdocs.exceptions import PluginError

    raw = (Path(config.site_dir) / "objects.inv").read_bytes()
    body = zlib.decompress(raw.split(b"\n", 4)[4]).decode()
    listed = {line.split(" ", 1)[0] for line in body.splitlines()}
    wanted = {name for name in modules()}
    wanted |= {f"{module}.{node.name}" for module, path in modules().items() for node in public_names(path)}
    if missing := sorted(wanted - listed):
        raise PluginError(f"public names that are missing from the API reference: {', '.join(missing)}")
