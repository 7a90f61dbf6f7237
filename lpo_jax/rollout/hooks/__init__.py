"""Hooks: what a method needs from the run around its updates.

`objectives/hook_specs.py` declares their settings; this package implements them.
"""

import contextlib
from collections.abc import Iterator, Sequence

from lpo_jax.errors import UserError
from lpo_jax.objectives import hook_specs as specs
from lpo_jax.objectives.method import Objective
from lpo_jax.rollout.environment import Environment
from lpo_jax.rollout.hooks import credits, hints, judges, prompts, replay, teachers
from lpo_jax.rollout.hooks.base import RunHook, Tools
from lpo_jax.tasks.images import row_images

# The implementation of each hook, by the class of its settings.
HOOKS: dict[type[specs.HookSpec], type[RunHook]] = {
    specs.Budgets: credits.Cuts,
    specs.DynamicSampling: prompts.Dynamic,
    specs.GaussianSampling: prompts.Gaussian,
    specs.GreedyBaseline: judges.Greedy,
    specs.Judge: judges.FlawJudge,
    specs.LadderHints: hints.Ladder,
    specs.LearnabilitySampling: prompts.Learnability,
    specs.PrefixValues: credits.Values,
    specs.PreviousPolicy: teachers.Previous,
    specs.Replay: replay.PreviousBatch,
    specs.SiblingTeacher: teachers.Sibling,
    specs.SolutionHints: hints.Solutions,
    specs.StepJudge: credits.StepCredits,
}

# Hooks that build prompts of their own, or store a batch, without its images.
TEXT_ONLY = (credits.Values, hints.Hints, replay.PreviousBatch, teachers.Sibling)


@contextlib.contextmanager
def open_hooks(objective: Objective, environment: Environment) -> Iterator[Sequence[RunHook]]:
    """The hooks of a method, in its order.

    Raises:
      UserError: the task lacks something that a hook needs, or has images that it cannot use.
    """
    hooks = [HOOKS[type(spec)](spec, environment, objective) for spec in objective.hooks]
    if any(row_images(row) for row in environment.train_rows):
        for hook in hooks:
            if isinstance(hook, TEXT_ONLY):
                name = type(hook.spec).__name__
                raise UserError(
                    f"objective {objective.name}: {name} is not supported for rows with images; take another method"
                )
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(hook) for hook in hooks]


__all__ = ["RunHook", "Tools", "open_hooks"]
