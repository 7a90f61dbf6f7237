"""Exact arithmetic on expressions that a model wrote. They are parsed and never evaluated as code."""

import ast
import operator
import re
from fractions import Fraction

MAX_CHARS = 200  # powers are not allowed, so this bounds the size of every intermediate number
MAX_DEPTH = 64

_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class NotAllowed(ValueError):
    """The text is not an expression of integers, `+ - * /` and parentheses."""


def parse_expression(text: str) -> ast.expr:
    """Parse an expression of non-negative integers with `+ - * /`, unary minus and parentheses.

    Args:
      text: the model's text; any whitespace counts as a space.

    Returns:
      A tree that consists of `BinOp`, `UnaryOp` and integer `Constant` nodes.

    Raises:
      NotAllowed: for anything else, such as powers, floor division, floats, names, calls, non-ASCII digits, more than
        200 characters, or more than 64 levels; the message gives the reason.
    """
    if len(text) > MAX_CHARS:
        raise NotAllowed(f"longer than {MAX_CHARS} characters")
    text = " ".join(text.split())
    if not text:
        raise NotAllowed("empty")
    if not _ALLOWED.fullmatch(text):
        raise NotAllowed("a character other than digits, + - * / and parentheses")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotAllowed("not an arithmetic expression") from None
    _check(tree, MAX_DEPTH)
    return tree


def _check(node: ast.expr, depth: int) -> None:
    if depth == 0:
        raise NotAllowed(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        _check(node.left, depth - 1)
        _check(node.right, depth - 1)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _check(node.operand, depth - 1)
    elif not (isinstance(node, ast.Constant) and type(node.value) is int):
        raise NotAllowed("only integers, + - * / and unary minus are allowed")


def value(tree: ast.expr) -> Fraction | None:
    """Return the exact value of a tree from `parse_expression`; None if it divides by zero."""
    try:
        return _value(tree)
    except ZeroDivisionError:
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand)
    return Fraction(node.value)  # type: ignore[attr-defined]


def integers(tree: ast.expr) -> list[int]:
    """Return the integers in a tree, in ascending order."""
    return sorted(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))  # type: ignore[misc]
