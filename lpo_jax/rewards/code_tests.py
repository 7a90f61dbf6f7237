"""Read the tests of programming problems, in the formats of common datasets, into pairs of input and output."""

import ast
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

from lpo_jax.types import Json


@dataclasses.dataclass(frozen=True)
class ProblemTests:
    """The tests of one programming problem.

    Attributes:
      function: the function to call; empty if the program reads stdin and prints.
      cases: pairs (stdin, stdout) of text or, for a function, (tuple of arguments, value) of builtin types.
      wrapped: whether every expected value is a list with one item. Some datasets wrap each value in such a list, so a
        function that returns the items themselves may also be right; see `readings`.
    """

    function: str
    cases: tuple[tuple[Json, Json], ...]
    wrapped: bool = False

    def readings(self, wanted: Json) -> tuple[Json, ...]:
        """Return the values that a test may expect. A program must match the same reading in all of its tests."""
        return (wanted, _integer_keys(wanted[0])) if self.wrapped else (wanted,)


def read_tests(stored: Json, metadata: Json = None) -> ProblemTests:
    """Read the tests of a problem as datasets store them.

    These formats are known:

    - PRIME, CodeContests: `{"inputs": [...], "outputs": [...]}`, with stdin and stdout as text or lists of lines.
    - The same with `"fn_name"`. Either an input is text with one argument per line, and its output is text; both are
      JSON or, if that does not parse, Python literals (for tuples and sets). Or an input is the list of arguments, and
      its output is the value itself or, in all tests, a list that holds only the value (`[[0], [1]]` for 0 and 1).
    - Codeforces: `[{"input": ..., "output": ...}, ...]`.
    - LiveCodeBench: the same with `"testtype"`, which is `stdin` or `functional`. For `functional` tests, `func_name`
      in the metadata of the row or of the tests names the function.

    Args:
      stored: the tests, as an object or its JSON text.
      metadata: the metadata of the row, as an object or its JSON text; None if it has none.

    Raises:
      ValueError, TypeError: if the tests cannot be read; the message gives the reason.
    """
    stored = as_columns(stored, metadata)
    inputs, outputs = stored["inputs"], stored["outputs"]
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence):
        raise ValueError("tests: inputs and outputs must be lists")
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"tests: {len(inputs)} inputs and {len(outputs)} outputs")
    function = stored.get("fn_name") or ""
    if function and not (isinstance(function, str) and function.isidentifier()):
        raise ValueError(f"tests: fn_name is {function!r}, which is not the name of a function")
    read = _call if function else _lines
    cases = tuple(read(given, wanted) for given, wanted in zip(inputs, outputs))
    if not function and not any(wanted.strip() for _, wanted in cases):
        raise ValueError("tests: no test expects any output, so a program that does nothing would pass")
    wrapped = all(isinstance(wanted, list | tuple) and len(wanted) == 1 for wanted in outputs)
    return ProblemTests(function, cases, bool(function) and wrapped)


def as_columns(stored: Json, metadata: Json = None) -> dict[str, Json]:
    """Convert tests to one object with `inputs`, `outputs` and, if they call a function, its name as `fn_name`.

    Args:
      stored, metadata: see `read_tests`.

    Raises:
      ValueError, TypeError: if the tests cannot be read; the message gives the reason.
    """
    if isinstance(stored, str):
        stored = json.loads(stored)
    if isinstance(stored, Sequence):
        if not all(isinstance(test, Mapping) and {"input", "output"} <= set(test) for test in stored):
            raise ValueError("tests: a list must hold objects with input and output")
        columns: dict[str, Json] = {key + "s": [test[key] for test in stored] for key in ("input", "output")}
        metadata = [metadata, *(test.get("metadata") for test in stored)]
        names = {name for name in map(_func_name, metadata) if name}
        kinds = {str(test.get("testtype") or ("functional" if names else "stdin")) for test in stored}
        if not (kinds <= {"stdin"} or kinds == {"functional"}):
            raise ValueError(
                f"tests: testtype must be stdin in all tests or functional in all tests, not {', '.join(sorted(kinds))}"
            )
        if kinds == {"functional"}:
            if len(names) != 1:
                raise ValueError(
                    "tests: testtype is functional, but metadata.func_name does not name one function"
                )
            columns["fn_name"] = names.pop()
        return columns
    if not isinstance(stored, Mapping) or not {"inputs", "outputs"} <= set(stored):
        raise ValueError(f"tests have no inputs and outputs: {str(stored)[:60]}")
    return dict(stored)


def _func_name(metadata: Json) -> str:
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            return ""
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    return name if isinstance(name, str) else ""


def _lines(given: Json, wanted: Json) -> tuple[str, str]:
    return _text(given), _text(wanted)


def _text(value: Json) -> str:
    if isinstance(value, list | tuple) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"tests: stdin and stdout must be text, not {str(value)[:60]}")
    return value


def _call(given: Json, wanted: Json) -> tuple[tuple[Json, ...], Json]:
    if not isinstance(given, str):
        if not isinstance(given, list | tuple):
            raise ValueError(f"tests: arguments must be a list, not {str(given)[:60]}")
        return tuple(map(_integer_keys, given)), _integer_keys(wanted)
    arguments = [_literal(line) for line in given.split("\n") if line.strip()]
    return tuple(arguments), _literal(wanted) if isinstance(wanted, str) else wanted


def _literal(text: str) -> Json:
    try:
        return _integer_keys(json.loads(text))
    except ValueError:
        try:
            return ast.literal_eval(text.strip())
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"tests: neither JSON nor a Python literal: {text[:60]}") from None


def _integer_keys(value: Json) -> Json:
    """Convert keys that are all integers in text form to integers, as PRIME does: keys in JSON are always text."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"-?[0-9]{1,18}", str(key)) for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def asserts_to_tests(code: str) -> dict[str, Json] | None:
    """Convert assertions about one function to tests, whose expected values stay outside the sandbox.

    The assertions have the form `assert f(3, [1]) == (4, 5)`. They stand alone (MBPP), or in `def check(candidate):`
    followed by a call `check(f)` or `check(Solution().f)` (HumanEval, LeetCode). Arguments and values must be literals.
    Keyword arguments are assumed to be in the order of the function's parameters, as in LeetCode's tests.

    Args:
      code: the assertions; definitions of plain data among them are ignored.

    Returns:
      `{"inputs", "outputs", "fn_name"}` for `read_tests`; None if any assertion has another form, because tests are
      used either completely or not at all.
    """
    try:
        body = ast.parse(code).body
        checks = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"]
        names = {name for name in map(_checked, body) if name}
        statements = checks[0].body if checks else body
        asserts = [node for node in statements if isinstance(node, ast.Assert) and not _idle(node)]
        others = [node for node in statements if not isinstance(node, ast.Assert | ast.Assign | ast.Import)]
        calls = [_called(node.test) for node in asserts]
        called = {name for name, _, _, _ in calls}
        orders = {keywords for _, _, keywords, _ in calls}
        if checks:
            called = names if called == {checks[0].args.args[0].arg} else set()
        if len(checks) > 1 or others or len(called) != 1 or len(orders) != 1:
            return None
        inputs = ["\n".join(map(repr, arguments)) for _, arguments, _, _ in calls]
        outputs = [repr(value) for _, _, _, value in calls]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError, IndexError):
        return None
    return {"inputs": inputs, "outputs": outputs, "fn_name": called.pop()}


def _checked(node: ast.stmt) -> str:
    """Return `f` for the statement `check(f)` or `check(Solution().f)`, else an empty text."""
    match node:
        case ast.Expr(ast.Call(ast.Name("check"), [ast.Name(name) | ast.Attribute(attr=name)], [])):
            return name
    return ""


def _idle(node: ast.Assert) -> bool:
    """Return whether the statement is `assert True`, which is frequent in HumanEval."""
    return isinstance(node.test, ast.Constant) and node.test.value is True


def _called(test: ast.expr) -> tuple[str, list[Json], tuple[str | None, ...], Json]:
    """Return the function, the arguments, the names of keyword arguments, and the expected value of an assertion.

    Raises:
      ValueError: if the assertion does not compare a call with a value.
    """
    match test:
        case ast.Compare(ast.Call(ast.Name(name), arguments, keywords), [ast.Eq() | ast.Is()], [value]):
            nodes = [*arguments, *(keyword.value for keyword in keywords)]
            given = [ast.literal_eval(node) for node in nodes]
            return name, given, tuple(keyword.arg for keyword in keywords), ast.literal_eval(value)
    raise ValueError("not an assertion about the value of a call")  # `assert f(x)` accepts any true value
