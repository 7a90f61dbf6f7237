"""Read and write the YAML of configs, suites and command lines."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import yaml

from lpo_jax.errors import UserError
from lpo_jax.types import Json


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys and reads 1e-6 as a number, which YAML 1.1 reads as text."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (first := lines.setdefault((key.tag, key.value), line)) != line:
                problem = f"the key {key.value!r} is already set in line {first}; keep one of the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes texts which the loader would read as numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def dump_yaml(values: Json) -> str:
    """Write plain values as YAML that `parse_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str) -> Json:
    """Parse a YAML text.

    Raises:
      ValueError: if it is not YAML or a key occurs twice; the message names the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: {getattr(error, 'problem', error)}" if mark else str(error)
        raise ValueError(" ".join(where.split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (ValueError, TypeError, OverflowError) as error:  # an invalid date, or a key that is a list
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: str | Path, what: str) -> Json:
    """Read a YAML file.

    Args:
      path: the file.
      what: the kind of file, for error messages.

    Raises:
      UserError: if the file does not exist, cannot be read, or is not YAML.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{what} {path}: no such file") from None
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path}: cannot be read (not UTF-8: {error.reason})") from None
    except ValueError as error:
        raise UserError(f"{what} {path}: not valid YAML ({error})") from None


def apply_override(values: dict[str, Json], override: str, free_form: Collection[str]) -> None:
    """Apply an override `--section.key=value` to the plain values of a config.

    Args:
      values: changed in place.
      override: the text; its value is YAML.
      free_form: sections of which a text is short for `{name: text}`.

    Raises:
      UserError: the override has another form, its value is not YAML, or the section is a value.
    """
    key, equals, text = override.removeprefix("--").partition("=")
    if not override.startswith("--") or not equals or not key:
        raise UserError(f"override {override!r}: write it as --section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        held = values.setdefault(section, {})
        if isinstance(held, str) and section in free_form:
            held = values[section] = {"name": held}
        if not isinstance(held, dict):
            raise UserError(f"override {override!r}: {section} is not a section")
        values = held
    try:
        values[last] = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML ({error})") from None


def numbers_in(key: str, value: Json) -> Iterator[tuple[str, float]]:
    """Yield (dotted key, number) for every floating-point number in plain values."""
    if isinstance(value, float):
        yield key, value
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    for name, item in value.items() if isinstance(value, Mapping) else ():
        yield from numbers_in(f"{key}.{name}", item)
