"""`lpo show`: a run, its responses and its groups in the terminal."""

import argparse

from lpo_jax.commands.parsers import CommandParser, finite, natural, positive
from lpo_jax.errors import UserError


def add_arguments(command: CommandParser) -> None:
    """Add the arguments of `lpo show`."""
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument(
        "--step", type=natural, help="the groups of this step, or with --prompt the page of one group"
    )
    command.add_argument("--prompt", metavar="ID", help="one prompt at all of its steps")
    command.add_argument(
        "--best", type=positive, metavar="N", help="the N responses with the highest rewards"
    )
    command.add_argument(
        "--worst", type=positive, metavar="N", help="the N responses with the lowest rewards"
    )
    command.add_argument("--pushed", type=positive, metavar="N", help="the N responses with the greatest |c|")
    command.add_argument(
        "--outcome",
        choices=("pass", "wrong", "malformed", "timeout", "infrastructure"),
        help="responses with this outcome",
    )
    command.add_argument(
        "--regex", help="responses that contain this regular expression, or whose prompt does"
    )
    command.add_argument("--min-reward", type=finite, help="responses with at least this reward")
    command.add_argument("--max-reward", type=finite, help="responses with at most this reward")
    command.add_argument("--min-tokens", type=natural, help="responses with at least this length")
    command.add_argument("--max-tokens", type=natural, help="responses with at most this length")
    command.add_argument("--limit", type=positive, default=20, help="most responses or groups to print (20)")


def run(arguments: argparse.Namespace) -> None:
    """Run `lpo show`."""
    from lpo_jax.inspection import terminal
    from lpo_jax.inspection.load import read_run
    from lpo_jax.reporting.text import console

    found = read_run(arguments.run)
    steps = [arguments.step] if arguments.step is not None else list(found.rollouts)
    if arguments.step is not None and arguments.step not in found.rollouts:
        there = (
            f"it has {len(found.rollouts)} steps from {min(found.rollouts)} to {max(found.rollouts)}"
            if found.rollouts
            else "it has none"
        )
        raise UserError(f"--step {arguments.step}: {found.path} has no rollout file of this step; {there}")
    selected = _selection(arguments)
    ranked = {
        name: getattr(arguments, name) for name in ("best", "worst", "pushed") if getattr(arguments, name)
    }
    conditions = any(
        getattr(arguments, name) is not None
        for name in ("outcome", "regex", "min_reward", "max_reward", "min_tokens", "max_tokens")
    )
    if ranked or conditions:
        parts = _responses(found, steps, selected, ranked, arguments.limit)
    elif arguments.prompt is not None:
        parts = [_prompt(found, steps, arguments.prompt, arguments.step is not None)]
    elif arguments.step is not None:
        parts = [terminal.step_groups(found, arguments.step, arguments.limit)]
    else:
        parts = [terminal.run_summary(found)]
    console().print(*parts, sep="\n")


def _selection(arguments: argparse.Namespace):
    from lpo_jax.inspection.select import Selection, compile_regex

    return Selection(
        outcome=arguments.outcome,
        prompt=arguments.prompt,
        regex=compile_regex(arguments.regex) if arguments.regex is not None else None,
        min_reward=arguments.min_reward,
        max_reward=arguments.max_reward,
        min_tokens=arguments.min_tokens,
        max_tokens=arguments.max_tokens,
    )


def _responses(found, steps, selected, ranked: dict[str, int], limit: int) -> list:
    """Panels of the responses that are selected: the first ones, or the best, worst and most pushed."""
    from lpo_jax.inspection import select, terminal
    from lpo_jax.inspection.load import read_samples

    rows = [
        row | {"step": step}
        for step in steps
        for row in read_samples(found.rollouts[step])[0]
        if selected(row)
    ]
    if not rows:
        return [f"no response of {len(steps)} steps fulfils the conditions"]
    orders = {"best": select.best, "worst": select.worst, "pushed": select.most_pushed}
    if ranked:
        return [
            terminal.responses(orders[name](rows, count), f"{name}, of {len(rows)} responses")
            for name, count in ranked.items()
        ]
    shown = "all" if len(rows) <= limit else f"the first {limit} of {len(rows)}; --limit shows more"
    return [terminal.responses(rows[:limit], f"responses, {shown}")]


def _prompt(found, steps, prompt: str, one: bool):
    """The page of a group, or a prompt at all of its steps."""
    from lpo_jax.inspection import terminal
    from lpo_jax.inspection.load import groups_of, read_samples

    groups = [
        (step, group)
        for step in steps
        for group in groups_of(read_samples(found.rollouts[step])[0])
        if str(group[0].get("id")) == prompt
    ]
    if not groups:
        where = f"step {steps[0]}" if one else "any step"
        raise UserError(
            f"--prompt {prompt}: {found.path} has no such prompt at {where}; --step N lists those of a step"
        )
    return terminal.group_page(found, *groups[0]) if one else terminal.prompt_history(found, prompt, groups)
