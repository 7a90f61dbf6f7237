"""Hooks at work: what a method asks of the run around its updates (`objectives/hook_specs.py` names them)."""

import contextlib
from collections.abc import Iterator, Sequence

from lpo_jax.objectives import hook_specs as specs
from lpo_jax.objectives.method import Objective
from lpo_jax.rollout.hooks import credits, hints, judges, prompts, replay, teachers
from lpo_jax.rollout.hooks.base import Round, RunHook, Tools
from lpo_jax.training.session import Session

_AT_WORK: dict[type[specs.HookSpec], type[RunHook]] = {
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
def open_hooks(objective: Objective, session: Session) -> Iterator[Sequence[RunHook]]:
    """The method's hooks, in its order. Raises `UserError` where the task lacks what one needs."""
    hooks = [_AT_WORK[type(spec)](spec, session, objective) for spec in objective.hooks]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(hook) for hook in hooks]


__all__ = ["Round", "RunHook", "Tools", "open_hooks"]
