"""Names for values whose type Python cannot express. A type checker treats them as `Any`."""

from typing import Any, TypeAlias

Json: TypeAlias = Any
"""A value of JSON or YAML: None, a bool, a number, a text, or a list or mapping of such values."""

PyTree: TypeAlias = Any
"""Nested dicts, lists, tuples or dataclasses with arrays, shardings or shapes as leaves."""

Tokenizer: TypeAlias = Any
"""A tokenizer of the libraries transformers or tokenizers, or a `ModelTokenizer`, which wraps one."""
