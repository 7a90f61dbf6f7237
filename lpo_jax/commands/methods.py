"""`lpo methods`: list the methods with their formulas and options."""

import argparse
import json

from lpo_jax.commands.parsers import CommandParser
from lpo_jax.errors import UserError


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo methods`."""
    command.add_argument("names", nargs="*", metavar="NAME", help="methods to show (all)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--markdown", action="store_true", help="print the text of docs/methods.md")


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo methods`."""
    from lpo_jax import objectives
    from lpo_jax.reporting.tables import method_table
    from lpo_jax.reporting.text import console

    if arguments.markdown:
        from lpo_jax.reporting.method_docs import markdown

        print(markdown(), end="")
        return
    known = objectives.names()
    for name in arguments.names:
        build_objective(name)  # raises for an unknown method
    methods = [known[name] for name in arguments.names or known]
    if arguments.json:
        print(json.dumps(methods, indent=2))
    else:
        console().print(method_table(methods))


def build_objective(spec: str):
    """Return the objective named by "name" or "name:option=value:option=value".

    Raises:
      UserError: the method or option does not exist, or a value is not valid YAML.
    """
    from lpo_jax import objectives
    from lpo_jax.yaml_text import parse_yaml

    name, *settings = spec.split(":")
    options = {}
    for setting in settings:
        key, given, value = setting.partition("=")
        if not given:
            raise UserError(f"method {spec!r}: write options as name:option=value, got {setting!r}")
        try:
            options[key] = parse_yaml(value)
        except ValueError as error:
            raise UserError(f"method {spec!r}: the value of {key} is not valid YAML ({error})") from None
    try:
        return objectives.get(name, **options)
    except ValueError as error:
        raise UserError(str(error)) from None
