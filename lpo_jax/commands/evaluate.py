"""`lpo eval`: held-out pass@k of a run's checkpoint, or of the model that a config starts from."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lpo_jax import reporting
from lpo_jax.config import load_config, override_config
from lpo_jax.errors import UserError
from lpo_jax.evaluation.heldout import Evaluation
from lpo_jax.json_lines import print_line
from lpo_jax.rollout.failures import warning
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.runs.directory import read_config
from lpo_jax.training.session import open_session


def evaluate_command(target: str, overrides: Sequence[str], checkpoint: str, as_json: bool) -> Evaluation:
    """Evaluates and prints a table, or JSON.

    Args:
      target: a run directory (its resolved config and a checkpoint of it), or a config file (its model as it is).
      overrides: `--a.b=value`, on either's config.
    """
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
    if told := warning(evaluation.failures, "held-out evaluation"):
        print(f"lpo: {told}", file=sys.stderr)
    result = evaluation.summary | {
        "model": label,
        "task": session.environment.task.name,
        "mean_reward": evaluation.mean_reward,
        "mean_length": evaluation.mean_length,
        "truncated": evaluation.truncated,
    }
    if as_json:
        print_line(result)
    else:
        title = f"Held-out {session.environment.task.name}"
        console = reporting.console()
        console.print(reporting.before_after_table([(label, evaluation.summary, None)], title))
        console.print(
            f"mean reward {evaluation.mean_reward:.3f} · mean length {evaluation.mean_length:.1f} tokens · "
            f"{evaluation.truncated:.1%} cut at sampling.max_tokens = {config.sampling.max_tokens}"
        )
    return evaluation
