"""`lpo eval`: held-out pass@k of a run's checkpoint, or of the initial model of a config."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lpo_jax.commands import suite
from lpo_jax.commands.devices import open_devices
from lpo_jax.commands.parsers import CommandParser, add_checkpoint_option
from lpo_jax.errors import UserError
from lpo_jax.json_lines import print_line


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo eval`."""
    text = "YAML file or run directory; with --suite, a run directory or a model"
    command.add_argument("target", metavar="CONFIG|RUN|MODEL", help=text)
    add_checkpoint_option(command)
    command.add_argument("--json", action="store_true", help="print the summary as JSON")
    suite.add_options(command)


def run(arguments: argparse.Namespace) -> int | None:
    """Run `lpo eval` and return the exit status."""
    if arguments.suite is not None:
        return suite.run(arguments)
    given = suite.given_options(arguments)
    # Without --suite these two are config keys.
    config_keys = [f"--{name}={given.pop(name)}" for name in ("task", "seed") if name in given]
    for name in given:
        raise UserError(f"--{name.replace('_', '-')} requires --suite; without it, set config keys (--help)")
    open_devices()
    overrides = [*config_keys, *arguments.overrides]
    evaluate_heldout(arguments.target, overrides, checkpoint=arguments.checkpoint, as_json=arguments.json)
    return None


def evaluate_heldout(target: str, overrides: Sequence[str], checkpoint: str, as_json: bool) -> None:
    """Evaluate a model on the held-out rows of its config and print a table or JSON.

    Args:
      target: a run directory, which gives the resolved config and a checkpoint, or a config file, which gives the
        initial model.
      overrides: `--a.b=value`, applied to the config.
      checkpoint: which checkpoint of a run to evaluate.
      as_json: whether to print JSON instead of a table.

    Raises:
      UserError: a wrong target, override or checkpoint.
    """
    from lpo_jax import reporting
    from lpo_jax.config import load_config, override_config
    from lpo_jax.rollout.failures import warning
    from lpo_jax.runs.checkpoint import load_run
    from lpo_jax.runs.directory import read_config
    from lpo_jax.training.session import open_session

    is_run = Path(target).is_dir()
    config = override_config(read_config(target), overrides) if is_run else load_config(target, overrides)
    with open_session(config) as session:
        if is_run:
            model, step = load_run(target, checkpoint)
            params, label = model.params, f"{target}, step {step}"
        elif checkpoint != "best":
            raise UserError(f"--checkpoint {checkpoint}: {target} is a config, not a run directory")
        else:
            params, label = session.model.load_params(), config.model.path
        evaluation = session.evaluate(params)
    if message := warning(evaluation.failures, "held-out evaluation"):
        print(f"lpo: {message}", file=sys.stderr)
    result = evaluation.summary | {
        "model": label,
        "task": session.environment.task.name,
        "mean_reward": evaluation.mean_reward,
        "mean_length": evaluation.mean_length,
        "truncated": evaluation.truncated,
    }
    if as_json:
        print_line(result)
        return
    title = f"Held-out {session.environment.task.name}"
    console = reporting.console()
    console.print(reporting.before_after_table([(label, evaluation.summary, None)], title))
    console.print(
        f"mean reward {evaluation.mean_reward:.3f} · mean length {evaluation.mean_length:.1f} tokens · "
        f"{evaluation.truncated:.1%} cut at sampling.max_tokens = {config.sampling.max_tokens}"
    )
