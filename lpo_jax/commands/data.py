"""`lpo data`: show a task's rows, prompts and content hash, and verify its solutions."""

import argparse
import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lpo_jax.commands.parsers import CommandParser
from lpo_jax.errors import UserError
from lpo_jax.json_lines import print_line
from lpo_jax.types import Json

if TYPE_CHECKING:
    from lpo_jax.tasks import Task

ROWS_DRAWN = 12


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo data`."""
    command.add_argument(
        "target", metavar="CONFIG|TASK", help="YAML file, or a task's name with --task.option=value"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--images", metavar="FILE.png", help="draw the images of the first rows into this file"
    )


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
    encoding: dict[str, Json] = {}
    if config.model.path != "-":
        from lpo_jax.models.load import load_config_and_tokenizer
        from lpo_jax.rollout.encode import count_image_tokens, encode_prompt, prompt_text, solution_text

        model, tokenizer, eos_ids = load_config_and_tokenizer(
            config.model.path, template_arguments=config.model.template_arguments
        )
        if tokenizer:
            encoding = {
                "encode": functools.partial(encode_prompt, task, tokenizer),
                "decode": functools.partial(prompt_text, tokenizer),
                "written": lambda row: solution_text(task, tokenizer, row, eos_ids),
            }
            if model.vision:
                encoding["image_tokens"] = functools.partial(count_image_tokens, tokenizer)
    summary = describe_task(task, **encoding, pool=dataclasses.asdict(config.rewards))
    if arguments.json:
        print_line(summary)
    else:
        print(sanitise("\n".join(description_lines(summary))))
    if arguments.images:
        draw_images(task, Path(arguments.images))


def draw_images(task: "Task", path: Path) -> None:
    """Draw the images of a task's first rows into a PNG file, each with its row and its reference answer.

    Raises:
      UserError: if the rows have no images, or the file cannot be written.
    """
    from lpo_jax.files import write_file
    from lpo_jax.reporting.pictures import contact_sheet
    from lpo_jax.tasks.images import row_images

    name, rows = ("train", task.train) if len(task.train) else ("held-out", task.heldout)
    first = list(rows[:ROWS_DRAWN])
    pictures = [
        (image.pixels(), f"{name} {index}: {task.gold(row) or ''}")
        for index, row in enumerate(first)
        for image in row_images(row)
    ]
    if not pictures:
        raise UserError(f"--images: the rows of task {task.name} have no images; omit the option")
    write_file(path, contact_sheet(pictures))
    print(f"wrote {path}: the images of the first {len(first)} rows", file=sys.stderr)
