"""`lpo plan`: compile a config for accelerators that this machine does not have."""

import argparse
import json
import sys
from typing import Any

from lpo_jax.commands.parsers import CommandParser
from lpo_jax.errors import UserError
from lpo_jax.planner import topology

DOES_NOT_FIT = 3  # exit status


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo plan`."""
    command.add_argument("config", metavar="CONFIG", help="YAML file; only config.json of its model is read")
    command.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="a slice of TPUs such as v5p:4x4x4, or GPUs such as h100:8 or '2x h100:8' (two hosts); chips: "
        + ", ".join(topology.CHIPS),
    )
    command.add_argument(
        "--estimate",
        action="store_true",
        help="compile nothing, and estimate everything by arithmetic; needs no compiler for the chip",
    )
    command.add_argument(
        "--lengths",
        metavar="LENGTHS",
        help="response lengths to plan for, beside full length: mean=1024,sigma=1.0 (log-normal, cut at "
        "sampling.max_tokens) or a run directory, whose recorded lengths are taken",
    )
    text = "plan only the config; suggest no better settings"
    command.add_argument("--no-suggest", dest="suggest", action="store_false", help=text)
    command.add_argument(
        "--whole",
        action="store_true",
        help="compile the sampler's unrolled programs at full depth (minutes) instead of extrapolating from two depths",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run `lpo plan` and return the exit status, which is `DOES_NOT_FIT` if the config does not fit.

    Raises:
      UserError: the topology is unknown, the config, mesh or response lengths are invalid, or the compiler for the
        chip is missing.
    """
    target = topology.parse_topology(arguments.topology)
    import jax

    jax.config.update("jax_platforms", "cpu")  # planning opens no accelerator, even if there is one
    from lpo_jax.config import load_config
    from lpo_jax.models.load import load_config_and_tokenizer
    from lpo_jax.planner.lengths import response_lengths
    from lpo_jax.planner.plan import plan
    from lpo_jax.planner.plan_json import to_json
    from lpo_jax.planner.plan_text import show
    from lpo_jax.training.check import check_config

    config = load_config(arguments.config, arguments.overrides)
    objective = check_config(config)
    sampling, prompts = config.sampling, config.training.prompts_per_step
    lengths = arguments.lengths and response_lengths(
        arguments.lengths, prompts, sampling.num_responses, sampling.max_tokens
    )
    if not arguments.estimate:
        topology.open_compiler(target)  # report a missing compiler before loading a model
    model, _, eos_ids = load_config_and_tokenizer(config.model.path)
    longest = config.sampling.max_prompt_tokens + config.sampling.max_tokens
    if longest > model.max_positions:
        raise UserError(
            f"sampling.max_prompt_tokens + max_tokens = {longest} is more than the {model.max_positions} positions of "
            f"{config.model.path}"
        )

    def report(line: str) -> None:
        print(f"lpo: {line}", file=sys.stderr, flush=True)

    options: dict[str, Any] = {
        "lengths": lengths,
        "estimate": arguments.estimate,
        "suggest": arguments.suggest,
        "whole": arguments.whole,
        "report": report,
    }
    result = plan(config, target, model, eos_ids, objective, **options)
    if arguments.json:
        print(json.dumps(to_json(result), indent=2))
    else:
        show(result, config.model.path)
    return 0 if result.spare(result.asked) >= 0 else DOES_NOT_FIT
