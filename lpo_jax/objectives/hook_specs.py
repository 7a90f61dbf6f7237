"""Settings of the hooks: what a run does for a method around its updates. `rollout/hooks/` implements them.

The settings hold no arithmetic, so that a method is one frozen, hashable composition. Each hook acts in one phase of
the step. The phases run in the order of `HookPhase`, whatever the order of a method's list of hooks is:

| phase | what happens | hooks |
|---|---|---|
| draw | chooses the prompts of a sampling round | `LearnabilitySampling`, `GaussianSampling` |
| mend | replaces failed groups or responses of this round | `SolutionHints`, `LadderHints` |
| select | chooses the groups to train on, and may request a further sampling round | `DynamicSampling` |
| annotate | fills fields of `Scored` for the objective | teachers, judges, baselines, credits |
| replay | adds an update on an earlier batch | `Replay` |

Hooks observe everything that was sampled in a step, before it is mended and selected. So the pass rates of a curriculum
are those of the plain prompts, including the solved and the hopeless ones. `problem` reports hooks that cannot be
combined.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import ClassVar

from lpo_jax.objectives.advantage import AnytimeReturns, Progress, StepPenalty, Utility
from lpo_jax.objectives.batch import Field
from lpo_jax.objectives.part import Part, word
from lpo_jax.objectives.regular import Distil, PreviousKL
from lpo_jax.objectives.shaping import FlawPenalty
from lpo_jax.objectives.weights import HookWeight, Untaught


class HookPhase(enum.Enum):
    """The phases of a step in which hooks act, in order. The value is the reason why a phase holds only one hook."""

    DRAW = "both choose the prompts that are sampled"
    MEND = "both replace the groups in which every response fails"
    SELECT = "both choose the groups that are learnt from"
    ANNOTATE = ""
    REPLAY = "both add an update on an earlier batch"


@dataclasses.dataclass(frozen=True)
class HookSpec(Part):
    """The base class: settings of something that the run does around sampling, before the objective is evaluated.

    Attributes:
      phase: the phase of the step in which the hook acts.
      gives: the fields of `Scored` that the hook fills.
      readers: the parts that are made for these fields. A method with the hook must contain the first of them, and no
        part that interprets the fields differently.
      setting: the option of a config that adds the first reader to a method.
    """

    phase: ClassVar[HookPhase] = HookPhase.ANNOTATE
    gives: ClassVar[tuple[Field, ...]] = ()
    readers: ClassVar[tuple[type[Part], ...]] = ()
    setting: ClassVar[str] = ""


def problem(parts: Sequence[Part]) -> str | None:
    """Return why the hooks of a method cannot be combined with each other or with its other parts, or None.

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
    """Return why two hooks cannot be combined, or ""."""
    if type(one) is type(other):
        return "it is named twice"
    if one.phase is other.phase and one.phase.value:
        return one.phase.value
    shared = sorted(set(one.gives) & set(other.gives))
    return f"both give {shared[0]}" if shared else ""


@dataclasses.dataclass(frozen=True)
class DynamicSampling(HookSpec):
    """Keep the groups whose rewards differ, and sample further prompts until they fill the batch.

    The criterion uses the verifier's rewards, after hints have mended the groups and before the method shapes the
    rewards. If the batch is not full after the last round, groups without signal fill it and are spread evenly over the
    updates of the step. If there are fewer groups with signal than updates, they are repeated so that each update has
    one. If no round found a group with signal, the updates of the step have none, as in a method without this hook: the
    optimizer moves by its momentum, and `lpo/useful_group_frac` is 0.

    Attributes:
      max_rounds: maximum number of sampling rounds.

    References:
      DAPO, arXiv 2503.14476, section 3.2.
    """

    phase = HookPhase.SELECT

    max_rounds: int = 10


@dataclasses.dataclass(frozen=True)
class LearnabilitySampling(HookSpec):
    """Take part of each batch in the order of the data, and draw the rest in proportion to p (1 - p), p the pass rate.

    Attributes:
      uniform_share: share of the batch that follows the order of the data.
      rate_momentum: momentum of the moving average of a prompt's pass rate; 0 keeps the rate of the last group.

    References:
      VAS, MMR1 (public code LengSicong/MMR1), which refreshes all pass rates every few steps with extra rollouts. Here
      they are the pass rates of the training groups.
    """

    phase = HookPhase.DRAW

    uniform_share: float = 0.5
    rate_momentum: float = 0.0


@dataclasses.dataclass(frozen=True)
class GaussianSampling(HookSpec):
    """Draw prompts in proportion to exp(-(p - 1/2)^2 / (2 width^2)), where p is the moving average of the pass rate.

    Attributes:
      rate_momentum: momentum of the moving average, which starts at 1/2.
      width: standard deviation of the curve, in pass rate.

    References:
      FG-ExPO, Gaussian curriculum sampling.
    """

    phase = HookPhase.DRAW

    rate_momentum: float = 0.9
    width: float = 0.35


@dataclasses.dataclass(frozen=True)
class SolutionHints(HookSpec):
    """Sample groups in which every response fails again, with growing parts of the row's solution, until one passes.

    The group is then trained on with the hint in its prompt.

    Attributes:
      hint_fractions: shares of the solution's text that are appended to the prompt, tried in order.

    References:
      GHPO (public code hkgc-1/GHPO).
    """

    phase = HookPhase.MEND

    hint_fractions: tuple[float, ...] = (0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class LadderHints(HookSpec):
    """In groups in which every response fails, replace one by a response that passed with the smallest sufficient hint.

    Rows have a field `hints`, a list of texts from the vaguest to the full solution. The new response is trained on
    under the prompt without the hint.

    Attributes:
      hint_after: number of steps before hints are used.

    References:
      Scaf-GRPO (public code dvlab-research/Scaf-GRPO).
    """

    phase = HookPhase.MEND

    hint_after: int = 50


@dataclasses.dataclass(frozen=True)
class Replay(HookSpec):
    """Add a clipped update on the previous batch, weighted by how much the mean reward has improved since.

    With xi = (mean reward - mean of the window) / deviation of the window, the weight is xi, or `regress_scale` xi if
    xi is negative. The deviation is at least the standard error of the batch's mean reward, so that a window of equal
    means does not make the weight diverge. If both are 0, the weight is 0.

    Attributes:
      window: number of steps in the window.
      regress_scale: factor of a negative xi.

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
    """Give failed responses a teacher if a response of their group passed: the policy with that response in its prompt.

    Attributes:
      top: number of top-k tokens of the teacher that are kept.
      reprompt: text appended to the prompt; `{solution}` is replaced by the passing response.

    References:
      SRPO.
    """

    gives = (Field.TEACHER,)
    readers = (Distil, Untaught)
    setting = "objective.regular=distil"

    top: int = 100
    reprompt: str = "\nA correct solution:\n{solution}\nSolve the problem again.\n"


@dataclasses.dataclass(frozen=True)
class PreviousPolicy(HookSpec):
    """Set `Scored.teacher` to the behaviour policy of the round.

    Attributes:
      top: number of top-k tokens that are kept; all others form one bin.
    """

    gives = (Field.TEACHER,)
    readers = (PreviousKL,)
    setting = "objective.regular=previous-kl"

    top: int = 100


@dataclasses.dataclass(frozen=True)
class GreedyBaseline(HookSpec):
    """Set `Scored.baseline` to the reward of one greedy response per prompt, which is not trained on.

    References:
      ReMax, arXiv 2310.10505.
    """

    gives = (Field.BASELINE,)
    readers = (Utility,)
    setting = "objective.centre=baseline"


@dataclasses.dataclass(frozen=True)
class Judge(HookSpec):
    """Set `Scored.flawed` on the passing responses in which a judge finds a wrong step.

    Attributes:
      judge: "path/to/file.py:function" of a function (response, example) -> bool, which returns True for a flawed
        response. A run does not start without it.

    References:
      FAPO (public code verl-recipe/fapo), whose judge is a generative reward model.
    """

    gives = (Field.FLAWED,)
    readers: ClassVar[tuple[type[Part], ...]] = (FlawPenalty,)
    setting = "objective.shape=flaw-penalty"

    judge: str = ""


@dataclasses.dataclass(frozen=True)
class StepJudge(Judge):
    """Set `Scored.credit` to 1 on the tokens of the steps that a judge finds wrong, and to 0 on the others.

    Attributes:
      judge: as in `Judge`, but the function returns a `Verdict`. Its parts hold, under "wrong", the wrong steps as
        ranges of characters of the response: "12:40 80:95", or "" for none.

    References:
      CAPO (credit), whose judge is the majority of several critiques of a generative model.
    """

    gives = (Field.CREDIT,)
    readers = (StepPenalty,)
    setting = "objective.credit=step-penalty"


@dataclasses.dataclass(frozen=True)
class PrefixValues(HookSpec):
    """Set `Scored.credit` to the change in the probability of the row's solution over each segment of a response.

    A response of n tokens is split into `segments` segments; token t is in segment t segments // n. The probability
    after a segment is that of the row's solution after the prompt, the response so far and the cue; before the first
    segment, it is that after the prompt and the cue. The credit of a token is the difference over its segment.

    Attributes:
      segments: number of segments of a response.
      cue: text that asks for the answer at this point.

    References:
      GRPO-VPS, which splits at the steps of the text.
    """

    gives = (Field.CREDIT,)
    readers = (Progress,)
    setting = "objective.credit=progress"

    segments: int = 4
    cue: str = "\nThe answer is "


@dataclasses.dataclass(frozen=True)
class Budgets(HookSpec):
    """Set `Scored.credit` to the reward that a response would get if it had to answer at each of several budgets.

    The layout is that of `credit.AnytimeReturns`: the tokens of segment s hold the mean reward of `summaries` answers,
    sampled after the prompt, the response up to the end of this segment, and the cue. A response that ends inside a
    segment is not cut there: its tokens in this segment hold its own reward.

    Attributes:
      budgets: number of budgets; the last one is the whole response.
      summaries: number of answers sampled at each cut.
      summary_tokens: maximum number of tokens of an answer.
      cue: text that asks for the answer at this point.

    References:
      AnytimeReasoner, arXiv 2505.13438; public code sail-sg/AnytimeReasoner, which also trains on the answers.
    """

    gives = (Field.CREDIT,)
    readers = (AnytimeReturns,)
    setting = "objective.credit=anytime-returns"

    budgets: int = 4
    summaries: int = 4
    summary_tokens: int = 64
    cue: str = "\nThe answer is "
