"""Hooks: what a method needs from the run around its updates.

`objectives/hook_specs.py` declares their settings; this package implements them.
"""

import contextlib
from collections.abc import Iterator, Sequence

from lpo_jax.objectives import hook_specs as specs
from lpo_jax.objectives.method import Objective
from lpo_jax.rollout.environment import Environment
from lpo_jax.rollout.hooks import credits, hints, judges, prompts, replay, teachers
from lpo_jax.rollout.hooks.base import RunHook, Tools

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


@contextlib.contextmanager
def open_hooks(objective: Objective, environment: Environment) -> Iterator[Sequence[RunHook]]:
    """The hooks of a method, in its order.

    Raises:
      UserError: the task lacks something that a hook needs.
    """
    hooks = [HOOKS[type(spec)](spec, environment, objective) for spec in objective.hooks]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(hook) for hook in hooks]


__all__ = ["RunHook", "Tools", "open_hooks"]
