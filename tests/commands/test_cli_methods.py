"""Test `lpo methods` and `lpo simplex`: their output, and one line for every user error."""

import json

import pytest

from lpo_jax import objectives
from lpo_jax.commands.main import main


@pytest.fixture
def fails(capsys):
    """Return a function that runs a command, checks that it ends with a user error, and returns the error line."""

    def run(*arguments):
        assert main(list(arguments)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return run


def test_methods_by_name(capsys):
    assert main(["methods", "gvpo", "tpo", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)] == ["gvpo", "tpo"]
    assert main(["methods", "gvpo"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "temperature=0.1" in printed and "temperature is beta" in printed and "tpo" not in printed


def test_methods_as_markdown(capsys):
    assert main(["methods", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Methods\n") and all(
        f"\n## {name}\n" in printed for name in objectives.names()
    )


def test_simplex(tmp_path, capsys):
    path = tmp_path / "out.png"
    methods = "lpo-forward:divergence=alpha:alpha=0.3, grpo"
    assert main(["simplex", "--rewards", "1,0.2,0", "--methods", methods, "--out", str(path)]) == 0
    assert str(path) in capsys.readouterr().out and path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("simplex", "--rewards", "1,0"), "needs three finite rewards, such as 1,0,0; got [1.0, 0.0]"),
        (("simplex", "--rewards", "1,0,x"), "--rewards: expected numbers, such as 1,0,0; got '1,0,x'"),
        (("simplex", "--out", "picture.pdf"), "its name ends in .png; got 'picture.pdf'"),
        (("simplex", "--out", "no/such/place.png"), "--out: no such directory: no/such"),
        (("simplex", "--methods", "lpo-foward"), "unknown method 'lpo-foward'; did you mean 'lpo-forward'?"),
        (("simplex", "--methods", "grpo:ddof"), "write options as name:option=value, got 'ddof'"),
        (("simplex", "--methods", "grpo:ddof=2"), "grpo: ddof must be one of 0, 1, got 2"),
        (("simplex", "--methods", "flowrl"), "cannot be drawn from rewards alone"),
        (("methods", "gropo"), "did you mean"),
    ],
)
def test_mistakes(fails, arguments, says):
    assert says in fails(*arguments)
