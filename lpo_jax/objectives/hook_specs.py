"""What a method asks of the run around its updates, as plain settings: `training/hooks/` does the work.

A hook has no arithmetic of its own here, so that a method is one frozen, hashable composition. Each hook acts in one
phase of the step, and the phases run in the order of `HookPhase` whatever the order of a method's list of hooks:

| phase | what happens | hooks |
|---|---|---|
| draw | chooses the prompts of a sampling round | `LearnabilitySampling`, `GaussianSampling` |
| mend | replaces failed groups or responses of that round | `SolutionHints`, `LadderHints` |
| select | chooses the groups to learn from, and may ask for a further sampling round | `DynamicSampling` |
| annotate | gives the objective fields of `Scored` | teachers, judges, baselines, credits |
| replay | adds an update on an earlier batch | `Replay` |

Everything sampled in a step, before it is mended and selected, is what hooks observe: a curriculum's pass rates are
those of the plain prompts, of solved and hopeless ones too. `problem` says which hooks cannot stand together.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import ClassVar

from lpo_jax.objectives.advantage import Utility
from lpo_jax.objectives.credit import AnytimeReturns, Progress, StepPenalty
from lpo_jax.objectives.fields import Field
from lpo_jax.objectives.part import Part, word
from lpo_jax.objectives.prompt_weight import HookWeight
from lpo_jax.objectives.proximal import PreviousKL
from lpo_jax.objectives.regular import Distil
from lpo_jax.objectives.shaping import FlawPenalty
from lpo_jax.objectives.token_weight import Untaught


class HookPhase(enum.Enum):
    """The phases of a step in which hooks act, in order. The value says why a phase holds one hook, if it does."""

    DRAW = "both choose the prompts that are sampled"
    MEND = "both replace the groups in which every response fails"
    SELECT = "both choose the groups that are learnt from"
    ANNOTATE = ""
    REPLAY = "both add an update on an earlier batch"


@dataclasses.dataclass(frozen=True)
class HookSpec(Part):
    """The base: what happens around sampling, before the objective sees the round.

    Attributes:
      phase: when in a step the hook acts.
      gives: the fields of `Scored` that the hook fills.
      readers: the parts that are made for these fields. A method with the hook holds the first of them, and no part
        that reads the fields in another sense.
      setting: the option of a config that puts the first reader into a method.
    """

    phase: ClassVar[HookPhase]
    gives: ClassVar[tuple[Field, ...]] = ()
    readers: ClassVar[tuple[type[Part], ...]] = ()
    setting: ClassVar[str] = ""


def problem(parts: Sequence[Part]) -> str | None:
    """Why the hooks of a method cannot work together, or with its other parts; None where they can.

    Args:
      parts: all parts of the method.
    """
    hooks = [part for part in parts if isinstance(part, HookSpec)]
    for i, hook in enumerate(hooks):
        for other in hooks[:i]:
            if reason := _conflict(hook, other):
                names = f"{word(other)} and {word(hook)}"
                return f"hooks: {names} cannot be combined: {reason}; leave one of them out"
    for hook in hooks:
        reading = [part for part in parts if set(hook.gives) & {*part.needs, *part.uses}]
        for part in reading:
            if not isinstance(part, hook.readers):
                return (
                    f"hooks: {word(part)} cannot use the {hook.gives[0]} that {word(hook)} gives; "
                    f"set {hook.setting} in its place"
                )
        if hook.gives and not any(isinstance(part, hook.readers[0]) for part in reading):
            return (
                f"hooks: nothing in the method uses the {hook.gives[0]} that {word(hook)} gives; "
                f"set {hook.setting}, or leave the hook out"
            )
    given = {name for hook in hooks for name in hook.gives}
    for part in parts:
        if lacking := sorted(set(part.uses) - given):
            return f"{word(part)} does nothing: no hook of the method gives {lacking[0]}; leave it out"
    return None


def _conflict(one: HookSpec, other: HookSpec) -> str:
    """Why two hooks cannot be combined; "" where they can."""
    if type(one) is type(other):
        return "it is named twice"
    if one.phase is other.phase and one.phase.value:
        return one.phase.value
    shared = sorted(set(one.gives) & set(other.gives))
    return f"both give {shared[0]}" if shared else ""


@dataclasses.dataclass(frozen=True)
class DynamicSampling(HookSpec):
    """Keep the groups whose rewards differ, and sample further prompts until the batch is full of them.

    Groups are judged by the verifier's rewards, before the method shapes them and after hints have mended them. If the
    rounds run out before the batch is full, groups without signal fill it and are spread evenly over the step's
    updates; where there are fewer groups with signal than updates, they are repeated so that each update has one. If no
    round found a group with signal, the step's updates have none, as in a method without this hook: the optimizer
    moves by its momentum, and `lpo/useful_group_frac` shows 0.

    Attributes:
      max_rounds: sampling rounds at most.

    References:
      DAPO, arXiv 2503.14476, section 3.2.
    """

    phase = HookPhase.SELECT

    max_rounds: int = 10


@dataclasses.dataclass(frozen=True)
class LearnabilitySampling(HookSpec):
    """Part of each batch in the order of the data, the rest drawn in proportion to p (1 - p) of the pass rate p.

    Attributes:
      uniform_share: of the batch that keeps the order of the data.
      rate_momentum: of the moving average of a prompt's pass rate; 0 keeps the last group's.

    References:
      VAS, MMR1 (public code LengSicong/MMR1), which refreshes all pass rates every few steps with extra
      rollouts; here they are those of the training groups.
    """

    phase = HookPhase.DRAW

    uniform_share: float = 0.5
    rate_momentum: float = 0.0


@dataclasses.dataclass(frozen=True)
class GaussianSampling(HookSpec):
    """Prompts drawn in proportion to exp(-(p - 1/2)^2 / (2 width^2)), p the moving average of the pass rate.

    Attributes:
      rate_momentum: of the moving average, which starts at 1/2.
      width: standard deviation of the curve, in pass rate.

    References:
      FG-ExPO, Gaussian curriculum sampling.
    """

    phase = HookPhase.DRAW

    rate_momentum: float = 0.9
    width: float = 0.35


@dataclasses.dataclass(frozen=True)
class SolutionHints(HookSpec):
    """Groups that all fail are sampled again behind growing parts of the row's solution, until one passes.

    The group is then trained on with the hint in its prompt.

    Attributes:
      hint_fractions: of the solution's text, tried in order.

    References:
      GHPO (public code hkgc-1/GHPO).
    """

    phase = HookPhase.MEND

    hint_fractions: tuple[float, ...] = (0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class LadderHints(HookSpec):
    """In groups that all fail, one response is replaced by one that passed with the least of the row's hints.

    Rows carry `hints`, a list of texts from the vaguest to the whole solution. The replacing response is trained
    on under the prompt without the hint.

    Attributes:
      hint_after: steps before hints are given.

    References:
      Scaf-GRPO (public code dvlab-research/Scaf-GRPO).
    """

    phase = HookPhase.MEND

    hint_after: int = 50


@dataclasses.dataclass(frozen=True)
class Replay(HookSpec):
    """One more clipped update on the batch before, weighed by how far this batch's reward beats the last ones'.

    With xi = (mean reward - mean of the window) / deviation of the window, the weight is xi, or
    `regress_scale` xi where it is negative. The deviation is taken to be no less than the standard error of the
    batch's own mean reward, so that a window of equal means does not make the weight explode; where both are 0 there
    is no scale, and the weight is 0.

    Attributes:
      window: steps in the window.
      regress_scale: of a negative xi.

    References:
      PIPO.
    """

    phase = HookPhase.REPLAY
    gives = (Field.WEIGHT,)
    readers = (HookWeight,)
    setting = "objective.prompt_weight=hook-weight"

    window: int = 8
    regress_scale: float = 0.1


@dataclasses.dataclass(frozen=True)
class SiblingTeacher(HookSpec):
    """Failed responses of a group that has a passing one get a teacher: the policy that has read the sibling.

    Attributes:
      top: likeliest tokens of the teacher that are kept.
      reprompt: what is put behind the prompt; `{solution}` stands for the passing response.

    References:
      SRPO.
    """

    phase = HookPhase.ANNOTATE
    gives = (Field.TEACHER,)
    readers = (Distil, Untaught)
    setting = "objective.regular=distil"

    top: int = 100
    reprompt: str = "\nA correct solution:\n{solution}\nSolve the problem again.\n"


@dataclasses.dataclass(frozen=True)
class PreviousPolicy(HookSpec):
    """`Scored.teacher` is the policy that sampled the round.

    Attributes:
      top: likeliest tokens that are kept; the rest is one bin.
    """

    phase = HookPhase.ANNOTATE
    gives = (Field.TEACHER,)
    readers = (PreviousKL,)
    setting = "objective.regular=previous-kl"

    top: int = 100


@dataclasses.dataclass(frozen=True)
class GreedyBaseline(HookSpec):
    """`Scored.baseline` is the reward of one greedy response a prompt, which is not learnt from.

    References:
      ReMax, arXiv 2310.10505.
    """

    phase = HookPhase.ANNOTATE
    gives = (Field.BASELINE,)
    readers = (Utility,)
    setting = "objective.centre=baseline"


@dataclasses.dataclass(frozen=True)
class Judge(HookSpec):
    """`Scored.flawed` marks the passing responses in which a judge finds a wrong step.

    Attributes:
      judge: "path/to/file.py:function", of a function (response, example) -> bool, True for a flawed one. The run
        refuses to start without.

    References:
      FAPO (public code verl-recipe/fapo), whose judge is a generative reward model.
    """

    phase = HookPhase.ANNOTATE
    gives = (Field.FLAWED,)
    readers: ClassVar[tuple[type[Part], ...]] = (FlawPenalty,)
    setting = "objective.shape=flaw-penalty"

    judge: str = ""


@dataclasses.dataclass(frozen=True)
class StepJudge(Judge):
    """`Scored.credit` is 1 on the tokens of the steps that a judge finds wrong, 0 on the others.

    Attributes:
      judge: as in `Judge`; the function gives a `Verdict` whose parts hold, under "wrong", the wrong steps as ranges of
        characters of the response: "12:40 80:95", or "" for none.

    References:
      CAPO (credit), whose judge is the majority of several critiques of a generative model.
    """

    phase = HookPhase.ANNOTATE
    gives = (Field.CREDIT,)
    readers = (StepPenalty,)
    setting = "objective.credit=step-penalty"


@dataclasses.dataclass(frozen=True)
class PrefixValues(HookSpec):
    """`Scored.credit` is what each part of a response did for the chance of the row's solution.

    A response of n tokens is cut in `segments` parts, token t being in part t segments // n. The chance after part m
    is the probability of the row's solution behind the prompt, the response so far and the cue (before the first
    part, behind the prompt and the cue); a token holds the difference over its part.

    Attributes:
      segments: parts of a response.
      cue: text that asks for the answer there and then.

    References:
      GRPO-VPS, which cuts at the steps of the text.
    """

    phase = HookPhase.ANNOTATE
    gives = (Field.CREDIT,)
    readers = (Progress,)
    setting = "objective.credit=progress"

    segments: int = 4
    cue: str = "\nThe answer is "


@dataclasses.dataclass(frozen=True)
class Budgets(HookSpec):
    """`Scored.credit` is what a response is worth when it is cut at each of several budgets and must answer there.

    The layout is `credit.AnytimeReturns`'s: on the tokens of segment s the mean reward of `summaries` answers, sampled
    behind the prompt, the response up to the end of that segment and the cue. A response that ends inside a segment
    is not cut there: its tokens in it hold its own reward.

    Attributes:
      budgets: number of budgets, the last of them the whole response.
      summaries: answers sampled at each cut.
      summary_tokens: tokens of an answer at most.
      cue: text that asks for the answer there and then.

    References:
      AnytimeReasoner, arXiv 2505.13438; public code sail-sg/AnytimeReasoner, which trains on the answers too.
    """

    phase = HookPhase.ANNOTATE
    gives = (Field.CREDIT,)
    readers = (AnytimeReturns,)
    setting = "objective.credit=anytime-returns"

    budgets: int = 4
    summaries: int = 4
    summary_tokens: int = 64
    cue: str = "\nThe answer is "
