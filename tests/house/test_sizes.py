"""Bounds on the size of files and functions of the package, so that each can be read at one go."""

from pathlib import Path

import house_figures as house

ROOT = Path(__file__).parents[2]
FILE_LINES = 450
FUNCTION_LINES = 60  # without its docstring


def test_no_file_is_too_long():
    lengths = {module.path: module.text.count("\n") for module in house.read_package(ROOT)}
    assert not {path: n for path, n in lengths.items() if n > FILE_LINES}


def test_no_function_is_too_long():
    lengths = dict(pair for module in house.read_package(ROOT) for pair in house.functions(module))
    assert not {name: n for name, n in lengths.items() if n > FUNCTION_LINES}


def test_docstrings_and_comments_are_not_lines_of_code(tmp_path):
    (tmp_path / house.PACKAGE).mkdir()
    (tmp_path / house.PACKAGE / "__init__.py").write_text(
        '"""A docstring\nof two lines."""\n\n# A comment.\nX = 1  # counts once\n\n'
        'def f():\n    """Another."""\n\n    text = """a string\n\n    of three"""\n    return text\n'
    )
    (module,) = house.read_package(tmp_path)
    assert house.code_lines(module) == 6
    assert list(house.functions(module)) == [("lpo_jax.f", 6)]
