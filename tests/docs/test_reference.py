"""The API reference: every public module is on a page, and every public name has a docstring.

These checks read the source. `make docs` also compares the public names to the inventory of the site that it built.
"""

import ast
import inspect
import re
import typing
from pathlib import Path

import pytest
import reference_pages as reference

import lpo_jax
from lpo_jax import objectives as O
from lpo_jax import rewards

ROOT = Path(__file__).parents[2]
Model = typing.get_type_hints(lpo_jax.load_model)["return"]


def test_every_public_module_is_on_one_page():
    files = [path for path in (ROOT / "lpo_jax").rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    public = {name.removesuffix(".__init__") for name in names if "._" not in name.replace(".__init__", "")}
    listed = [
        module
        for page in reference.pages()
        for module in re.findall(r"^::: (\S+)$", reference.markdown(page), re.M)
    ]
    assert len(listed) == len(set(listed)) and set(listed) == public
    rooms = {path.name for path in (ROOT / "lpo_jax").iterdir() if any(path.glob("*.py"))} - {"__pycache__"}
    assert set(reference.pages()) == {f"reference/{room}.md" for room in rooms | {"ground"}}


def test_every_public_name_has_a_docstring():
    missing = []
    for module, path in reference.modules().items():
        if not ast.get_docstring(ast.parse(path.read_text())):
            missing.append(module)
        missing += [f"{module}.{x.name}" for x in reference.public_names(path) if not ast.get_docstring(x)]
    assert not missing


def test_no_docstring_reads_as_a_link():
    """In Markdown `[rule][method]` is a link, which the site cannot resolve: it needs backticks."""
    found = []
    for module, path in reference.modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                text := ast.get_docstring(node)
            ):
                prose = re.sub(r"`[^`]*`|^ {4}.*$", "", text, flags=re.M)
                found += [(module, match[0]) for match in re.finditer(r"\w+\]\[\w+", prose)]
    assert not found


def test_the_definitions_of_a_module_are_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "def shown(): ...\n\n\ndef _hidden(): ...\n\n\nclass Shown: ...\n\n\nclass _Hidden: ...\n"
    )
    assert [node.name for node in reference.public_names(path)] == ["shown", "Shown"]


def _parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


# The public API that other projects build on: function -> sections that its docstring must have.
API = {
    O.listwise_log_probs: ("Args", "Returns"),
    O.temperature: ("Args", "Returns", "Raises", "References"),
    O.target_log_probs: ("Args", "Returns", "References"),
    O.divergence: ("Raises",),
    O.Divergence.value: ("Args", "Returns"),
    O.Divergence.coefficients: ("Returns",),
    O.f_divergence: ("Args", "References"),
    O.bregman: ("Args", "References"),
    O.get: ("Args", "Returns", "Raises"),
    O.Objective.__call__: ("Args", "Returns", "Raises"),
    lpo_jax.load_model: ("Args", "Raises"),
    Model.logits: ("Args", "Returns"),
    Model.generate: ("Args", "Returns", "Raises"),
    Model.save: (),
    rewards.get: ("Args", "Returns", "Raises"),
}


@pytest.mark.parametrize("function", API, ids=lambda f: f.__qualname__)
def test_the_public_api_is_documented(function):
    text = inspect.getdoc(function)
    sections = set(re.findall(r"^(Args|Returns|Raises|References):", text, re.M))
    assert sections >= set(API[function])
    if "Args" in sections:
        section = re.search(r"^Args:\n(.*?)(?=^\w|\Z)", text, re.M | re.S)[1]
        named = re.findall(r"^  (\S[^:\n]*):", section, re.M)
        named = {name.strip().lstrip("*") for names in named for name in names.split(",")}
        assert named >= set(_parameters(function))


@pytest.mark.parametrize(
    "function", [O.listwise_log_probs, O.temperature, O.target_log_probs, O.Divergence.value, Model.logits]
)
def test_arrays_have_shapes(function):
    assert re.search(r"\[[PB],", inspect.getdoc(function))


def test_the_input_records_have_shapes_and_units():
    for record in (O.TokenStats, O.Scored):
        text = inspect.getdoc(record)
        fields = [name for name in record.__dataclass_fields__]
        assert "Attributes:" in text
        assert [name for name in fields if not re.search(rf"\b{name}\b[^:\n]*:", text)] == []


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"^ +- [^:\n]+: (\S+\.md)$", text, re.M))
