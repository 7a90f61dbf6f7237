"""`lpo data`: show a task's rows, prompts and content hash, and verify its solutions."""

import argparse
import dataclasses
import functools
import os

from lpo_jax.commands.parsers import CommandParser
from lpo_jax.errors import UserError
from lpo_jax.json_lines import print_line


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo data`."""
    command.add_argument(
        "target", metavar="CONFIG|TASK", help="YAML file, or a task's name with --task.option=value"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo data`."""
    from lpo_jax import tasks
    from lpo_jax.config import load_config, override_config, parse_config
    from lpo_jax.reporting.text import sanitise
    from lpo_jax.tasks.describe import describe_task, description_lines

    if arguments.target in tasks.names():  # a task's name needs no model
        config = parse_config({"output": "-", "model": {"path": "-"}, "task": arguments.target})
        config = override_config(config, arguments.overrides)
    elif not os.path.exists(arguments.target):
        raise UserError(
            f"{arguments.target}: neither a config file nor a task; the tasks are {', '.join(tasks.names())}"
        )
    else:
        config = load_config(arguments.target, arguments.overrides)
    options = dict(config.task)
    task = tasks.get(options.pop("name"), **options)
    encoding = {}
    if config.model.path != "-":
        from lpo_jax.models.load import load_config_and_tokenizer
        from lpo_jax.rollout.encode import solution_text
        from lpo_jax.sampling.text import encode

        _, tokenizer, eos_ids = load_config_and_tokenizer(
            config.model.path, template_arguments=config.model.template_arguments
        )
        if tokenizer:
            encoding = {
                "encode": functools.partial(encode, tokenizer),
                "decode": tokenizer.decode,
                "written": lambda row: solution_text(task, tokenizer, row, eos_ids),
            }
    summary = describe_task(task, **encoding, pool=dataclasses.asdict(config.rewards))
    if arguments.json:
        print_line(summary)
    else:
        print(sanitise("\n".join(description_lines(summary))))
