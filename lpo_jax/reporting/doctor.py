"""The run doctor: names what is wrong with a run, from its metrics, and the remedy.

`Doctor.observe` takes the rows of `metrics.jsonl` one by one, while the run goes on; `diagnose` takes all of them
afterwards. Both use the same checks, which are pure functions of the rows so far. A verifier that fails on every
response stops the run before its row is written (`rollout/failures.py`).
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from lpo_jax.reporting.metric_names import heldout_score
from lpo_jax.reporting.text import percent
from lpo_jax.rollout.failures import WARN_ABOVE

FEW = 3  # consecutive steps after which a large share counts as a state of the run
LONG = 8  # the same for groups without signal, of which healthy runs have phases
TREND = 10  # steps of each of the two windows whose means are compared
BEGINNING = 5  # first steps that later ones are compared with
RECENT = 40  # steps that the checks look back on


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """One thing that is wrong with a run.

    Attributes:
      name: of the check, such as `truncated-responses`.
      steps: the steps at which the check found it, in order.
      evidence: the numbers, of the last of these steps.
      remedy: what to change.
    """

    name: str
    steps: tuple[int, ...]
    evidence: str
    remedy: str

    def line(self) -> str:
        """The diagnosis as one line for the console."""
        first, last = self.steps[0], self.steps[-1]
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        return f"warning: {self.name} ({when}): {self.evidence}; {self.remedy}"


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A held-out evaluation: its step, score with interval, and the mean reward of the training steps before it."""

    step: int
    score: float
    low: float
    high: float
    reward: float


@dataclasses.dataclass(frozen=True)
class History:
    """The rows so far.

    Attributes:
      first: of the first `BEGINNING` training steps.
      recent: of the last `RECENT` training steps.
      evaluations: all held-out evaluations.
      passed: whether any response has passed in training.
    """

    first: Sequence[Mapping]
    recent: Sequence[Mapping]
    evaluations: Sequence[Evaluated]
    passed: bool

    def last(self, name: str, count: int) -> list[float]:
        """Values of a metric in the last `count` training steps; empty if one of them has none."""
        values = [row.get(name) for row in self.recent[-count:]]
        return values if len(values) == count and all(_finite(value) for value in values) else []

    def beginning(self, name: str) -> float:
        """Mean of a metric over the first steps; NaN until they are complete and a later one follows."""
        values = [row[name] for row in self.first if _finite(row.get(name))]
        complete = len(values) == BEGINNING and self.recent[-1]["step"] > self.first[-1]["step"] + FEW
        return statistics.fmean(values) if complete else math.nan


Found = tuple[str, str]  # evidence and remedy


def masked_responses(history: History) -> Found | None:
    """The verifier failed on more than 5% of the responses of a step, which are masked."""
    share = history.last("reward/outcome/infrastructure", 1)
    if not share or share[0] <= WARN_ABOVE:
        return None
    return (
        f"the verifier failed on {percent(share[0])} of the responses, which are masked",
        "read `parts.reason` of the infrastructure outcomes in rollouts/ and repair the verifier, or raise "
        "rewards.timeout",
    )


def truncated_responses(history: History) -> Found | None:
    """More than half of the responses were cut at the length limit."""
    shares = history.last("response_length/clip_ratio", FEW)
    if not shares or min(shares) <= 0.5:
        return None
    return (
        f"{percent(shares[-1])} of the responses were cut at the length limit",
        "raise sampling.max_tokens, ask for shorter answers in the prompt, or set sampling.stop",
    )


def groups_without_signal(history: History) -> Found | None:
    """All rewards were equal in more than half of the groups for several steps."""
    shares = history.last("lpo/degenerate_group_frac", LONG)
    if not shares or min(shares) <= 0.5:
        return None
    passes = statistics.fmean(history.last("reward/pass_rate", LONG) or [math.nan])
    too = "use harder problems" if passes > 0.5 else "use easier problems, a warm start (warm_start.steps)"
    return (
        f"{percent(shares[-1])} of the groups had equal rewards and taught nothing, more than half for {LONG} steps",
        f"add the hook dynamic-sampling (objective.hooks), which samples further prompts in their place, or {too} or "
        "more sampling.num_responses",
    )


def entropy_collapse(history: History) -> Found | None:
    """The policy has become almost deterministic without solving the task."""
    now, start = history.last("actor/entropy", FEW), history.beginning("actor/entropy")
    passes = history.last("reward/pass_rate", FEW)
    if not now or not statistics.fmean(now) < 0.05 * start or (passes and statistics.fmean(passes) > 0.9):
        return None
    return (
        f"the entropy fell to {now[-1]:.3g} nats a token from {start:.3g} at the beginning",
        "lower optimizer.learning_rate, add a KL or entropy term, or take a method that keeps exploring (lpo methods)",
    )


def repetition(history: History) -> Found | None:
    """Responses repeat themselves."""
    shares = history.last("response/repetition", FEW)
    if not shares or min(shares) <= 0.4:
        return None
    return (
        f"{percent(shares[-1])} of the four-token sequences had occurred before in the same response",
        "lower optimizer.learning_rate, and look for rewards that long repetitive responses earn",
    )


def reward_without_passes(history: History) -> Found | None:
    """The reward that the method maximises rises while fewer responses pass."""
    rewards, passes = (
        _change(history.last(name, 2 * TREND)) for name in ("critic/rewards/mean", "reward/pass_rate")
    )
    if not (rewards and passes and rewards.significance > 2 and passes.significance < -2):
        return None
    return (
        f"the reward rose from {rewards.before:.3g} to {rewards.after:.3g} while the pass rate fell from "
        f"{percent(passes.before)} to {percent(passes.after)}",
        "read the responses of highest reward in rollouts/: the reward or its shaping pays for something else than "
        "passing",
    )


def heldout_falls(history: History) -> Found | None:
    """The training reward rises while the held-out score falls below an earlier one, with separate intervals."""
    if len(history.evaluations) < 2:
        return None
    now, best = history.evaluations[-1], max(history.evaluations[:-1], key=lambda e: e.score)
    if now.step < history.recent[-1]["step"]:
        return None
    reward = best.reward if best.step else history.first[0].get("critic/rewards/mean", math.nan)
    if not (now.high < best.score and now.score < best.low and now.reward > reward):
        return None
    return (
        f"the held-out score fell from {best.score:.3g} at step {best.step} to {now.score:.3g} while the training "
        f"reward rose from {reward:.3g} to {now.reward:.3g}",
        "take the best checkpoint instead of the last, lower optimizer.learning_rate, or train on more problems",
    )


def sampler_gap(history: History) -> Found | None:
    """The log-probs of sampler and trainer drift apart."""
    now, start = history.last("lpo/logp_gap_mean", FEW), history.beginning("lpo/logp_gap_mean")
    if not now or not statistics.fmean(now) > max(3 * start, 1e-3):
        return None
    return (
        f"sampler and trainer differ by {now[-1]:.2g} nats a token, by {start:.2g} at the beginning",
        "set training.behaviour=rescored, sampling.weights=float and sampling.kv_dtype=compute; with "
        "model.dtype=float32 it is a bug to report",
    )


def gradient_spike(history: History) -> Found | None:
    """The norm of the gradient is ten times what it was."""
    return _spike(
        history,
        "actor/grad_norm",
        0.0,
        "the gradient norm",
        "lower optimizer.learning_rate or optimizer.clip_norm, and read the responses of that step for outliers",
    )


def score_spike(history: History) -> Found | None:
    """A response's log-ratio to the behaviour policy is ten times what it was."""
    return _spike(
        history,
        "lpo/score_abs_max",
        1.0,
        "the largest score (log-ratio of a response)",
        "lower optimizer.learning_rate or training.updates_per_step: the policy moves far from the one that sampled",
    )


def nonfinite_gradients(history: History) -> Found | None:
    """Updates were skipped because their gradients were not finite."""
    skipped = history.last("lpo/skipped_updates", 1)
    if not skipped or not skipped[0]:
        return None
    return (
        f"{skipped[0]:.0f} updates were skipped because their gradients were not finite",
        "lower optimizer.learning_rate, or set model.dtype=float32",
    )


def unreachable_pass(history: History) -> Found | None:
    """Rewards differ, but no response has ever counted as a pass."""
    passes = history.last("reward/pass_rate", TREND)
    lowest, highest = (history.last(f"critic/score/{how}", TREND) for how in ("min", "max"))
    if not passes or not highest or history.passed:
        return None
    if max(highest) <= min(lowest) or any(evaluated.score > 0 for evaluated in history.evaluations):
        return None
    return (
        f"rewards reach {max(highest):.3g}, but no response has passed",
        "a plain number passes at 1 or more: return a Verdict with its outcome, scale the reward, or set "
        "evaluation.score=reward to be judged by it",
    )


def slow_verifier(history: History) -> Found | None:
    """Steps wait for the verifier most of the time."""
    verifying, steps = (history.last(name, FEW) for name in ("timing_s/reward", "timing_s/step"))
    if not verifying or not steps or any(v <= 0.5 * s for v, s in zip(verifying, steps)):
        return None
    return (
        f"the last step waited {verifying[-1]:.1f} of its {steps[-1]:.1f} s for the verifier",
        "raise rewards.workers, lower rewards.timeout, or make the verifier faster",
    )


def zero_learning_rate(history: History) -> Found | None:
    """The learning rate is 0, so that nothing is learned."""
    rates = history.last("actor/lr", FEW)
    if not rates or any(rates):
        return None
    return (
        f"the learning rate was 0 in the last {FEW} steps",
        "set optimizer.learning_rate, or a later end of the schedule (training.steps, optimizer.final_fraction)",
    )


CHECKS: tuple[Callable[[History], Found | None], ...] = (
    masked_responses,
    truncated_responses,
    groups_without_signal,
    entropy_collapse,
    repetition,
    reward_without_passes,
    heldout_falls,
    sampler_gap,
    gradient_spike,
    score_spike,
    nonfinite_gradients,
    unreachable_pass,
    slow_verifier,
    zero_learning_rate,
)


class Doctor:
    """Examines a run row by row.

    Args:
      rows: those that the run has already written; a resumed run hands them over.
    """

    def __init__(self, rows: Iterable[Mapping] = ()):
        self._first: list[Mapping] = []
        self._recent: collections.deque[Mapping] = collections.deque(maxlen=RECENT)
        self._evaluations: list[Evaluated] = []
        self._passed = False
        for row in rows:
            self._add(row)

    def observe(self, row: Mapping) -> list[Diagnosis]:
        """Add a row of metrics, with its step, and return what is wrong at that step."""
        if not self._add(row):
            return []
        history = History(self._first, list(self._recent), self._evaluations, self._passed)
        found = ((check, check(history)) for check in CHECKS)
        return [Diagnosis(name_of(check), (row["step"],), *why) for check, why in found if why]

    def _add(self, row: Mapping) -> bool:
        """Return whether the row is of a training step or an evaluation."""
        score = heldout_score(row)
        if score is not None:
            before = (r.get("critic/rewards/mean") for r in list(self._recent)[-TREND:])
            rewards = [reward for reward in before if _finite(reward)]
            mean = statistics.fmean(rewards) if rewards else math.nan
            self._evaluations.append(Evaluated(row["step"], *score, mean))
        if "actor/grad_norm" in row:
            self._recent.append(row)
            self._passed |= _finite(row.get("reward/pass_rate")) and row["reward/pass_rate"] > 0
            if len(self._first) < BEGINNING:
                self._first.append(row)
        return bool(self._recent) and (score is not None or "actor/grad_norm" in row)


def name_of(check: Callable[[History], Found | None]) -> str:
    """The name of a check in diagnoses."""
    return check.__name__.replace("_", "-")


def diagnose(rows: Iterable[Mapping]) -> list[Diagnosis]:
    """Examine all rows of a run (`reporting.read_metrics`).

    Returns:
      One diagnosis for each check that found something, in the order of their first steps, with the evidence of the
      last step at which it did.
    """
    doctor = Doctor()
    found: dict[str, list[Diagnosis]] = collections.defaultdict(list)
    for row in rows:
        for diagnosis in doctor.observe(row):
            found[diagnosis.name].append(diagnosis)
    steps = {name: dict.fromkeys(d.steps[0] for d in all_of_it) for name, all_of_it in found.items()}
    return [dataclasses.replace(found[name][-1], steps=tuple(steps[name])) for name in found]


@dataclasses.dataclass(frozen=True)
class _Change:
    before: float
    after: float
    significance: float  # difference in standard errors


def _change(values: list[float]) -> _Change | None:
    """Compare the means of the two halves of some values."""
    if not values:
        return None
    halves = values[: len(values) // 2], values[len(values) // 2 :]
    before, after = map(statistics.fmean, halves)
    error = math.sqrt(sum(statistics.variance(half) / len(half) for half in halves))
    return _Change(before, after, (after - before) / max(error, 1e-9))


def _spike(history: History, name: str, least: float, what: str, remedy: str) -> Found | None:
    values = [row[name] for row in history.recent if _finite(row.get(name)) and row[name] > 0]
    now = history.last(name, 1)
    if not now or len(values) <= BEGINNING:
        return None
    typical = statistics.median(values[:-1])
    if now[0] <= max(10 * typical, least):
        return None
    return f"{what} is {now[0]:.3g}, {now[0] / typical:.0f} times its median of {typical:.3g}", remedy


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
