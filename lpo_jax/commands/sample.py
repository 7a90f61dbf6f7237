"""`lpo sample`: print responses of a model to prompts."""

import argparse
from pathlib import Path

from lpo_jax.commands import parsers
from lpo_jax.commands.devices import open_devices
from lpo_jax.commands.parsers import CommandParser
from lpo_jax.errors import UserError
from lpo_jax.json_lines import print_line


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo sample`."""
    text = "HF directory, hf:org/name, .gguf file, pypi:name==version, or a run directory"
    command.add_argument("model", metavar="MODEL", help=text)
    command.add_argument("prompt", nargs="+", help="one or more prompts")
    command.add_argument(
        "--chat", action="store_true", help="format the prompts with the model's chat template"
    )
    command.add_argument("--template-arguments", **parsers.TEMPLATE_ARGUMENTS)
    command.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image for every prompt, in front of its text or at its mark <image>; may be repeated",
    )
    command.add_argument(
        "-n", "--num-responses", type=parsers.positive, default=1, help="responses per prompt (1)"
    )
    command.add_argument("--temperature", type=parsers.finite, default=1.0, help="0 is greedy (1.0)")
    command.add_argument("--top-p", type=parsers.finite, default=1.0, help="nucleus sampling (1.0: off)")
    command.add_argument(
        "--max-tokens", type=parsers.positive, default=128, help="maximum tokens per response (128)"
    )
    command.add_argument("--stop", default=[], **parsers.STOP)
    command.add_argument("--seed", type=int, default=0, help="seed of the random numbers (0)")
    command.add_argument("--json", action="store_true", help="print one JSON object per response")


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo sample`.

    Raises:
      UserError: an image cannot be read, or the model reads text only.
    """
    from lpo_jax.rollout.encode import with_placeholders
    from lpo_jax.runs.checkpoint import load_model_or_run
    from lpo_jax.tasks.images import MARK
    from lpo_jax.tasks.task import message_parts

    images = [_read(file) for file in arguments.image]
    open_devices()
    model = load_model_or_run(arguments.model)
    prompts = arguments.prompt
    if images:
        if model.config.vision is None:
            raise UserError(f"--image: {arguments.model} reads text only; take a vision model")
        prompts = [text if MARK in text else MARK * len(images) + text for text in prompts]
    if arguments.template_arguments is not None and not arguments.chat:
        raise UserError("--template-arguments: requires --chat; raw prompts use no template")
    if arguments.chat:
        content = message_parts if images else lambda text: text
        prompts = [[{"role": "user", "content": content(prompt)}] for prompt in prompts]
    elif images:
        prompts = [with_placeholders(model.tokenizer, prompt) for prompt in prompts]
    generated = model.generate(
        prompts,
        images=[images] * len(prompts) if images else None,
        num_responses=arguments.num_responses,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
        template_arguments=arguments.template_arguments,
    )
    for prompt, texts, finished in zip(arguments.prompt, generated.texts, generated.finished):
        for k, (text, ended) in enumerate(zip(texts, finished)):
            if arguments.json:
                print_line({"prompt": prompt, "k": k, "text": text, "finished": bool(ended)})
            else:
                print(text if ended else text + " [cut at --max-tokens]")


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"--image {file}: cannot be read ({error.strerror})") from None
