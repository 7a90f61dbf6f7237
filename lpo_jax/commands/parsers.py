"""Shared parts of the argument parsers: the parser class, options of several commands, and argument types."""

import argparse
import math

from lpo_jax.types import Json


class CommandParser(argparse.ArgumentParser):
    """The parser of one command. Its help lists the config keys if the command accepts them."""

    def format_help(self) -> str:
        if self.get_default("overrides") is not None:
            from lpo_jax.config import describe_options

            rows = [f"  --{key}=...  {meaning} [{default}]" for key, default, meaning in describe_options()]
            self.epilog = "every config key can be overridden:\n" + "\n".join(rows)
        return super().format_help()


def add_checkpoint_option(command: CommandParser) -> None:
    """Add the option --checkpoint."""
    text = "best (by evaluation.score), latest, or the number of a step (best)"
    command.add_argument("--checkpoint", default="best", help=text)


def finite(text: str) -> float:
    """Parse a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def positive(text: str) -> int:
    """Parse a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def natural(text: str) -> int:
    """Parse an integer that is not negative."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def some_text(text: str) -> str:
    """Check that a text is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def stop_string(text: str) -> str:
    """Check that a text is not empty; it may consist of blanks."""
    if not text:
        raise argparse.ArgumentTypeError("an empty stop string would end every response at its first token")
    return text


def _mapping(text: str) -> dict[str, Json]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected {{name: value, ...}}, got {text!r}")
    return value


# Keyword arguments of `add_argument` for --stop and --template-arguments.
STOP: dict[str, Json] = {
    "type": stop_string,
    "action": "append",
    "help": "a string that ends a response; may be repeated",
}
TEMPLATE_ARGUMENTS: dict[str, Json] = {
    "type": _mapping,
    "metavar": "{NAME: VALUE}",
    "help": "variables of the chat template, such as '{enable_thinking: false}' (default for a run: its own)",
}
