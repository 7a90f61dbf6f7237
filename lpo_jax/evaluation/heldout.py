"""Held-out evaluation on fixed problems with fixed random numbers, so that two evaluations can be paired."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from lpo_jax.errors import UserError, nearest
from lpo_jax.evaluation.metrics import mean_score, summarise
from lpo_jax.rollout.collect import Collector, Rollouts
from lpo_jax.rollout.failures import Failures, failures, require_judged
from lpo_jax.sampling import SampleRequest
from lpo_jax.tasks import Row
from lpo_jax.types import Json, PyTree

# Added to the run's seed, so that held-out samples never share random numbers with training.
SEED_OFFSET = 0x5EED


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of evaluating one model. P problems, N samples each.

    Attributes:
      summary: the dict of `metrics.summarise`.
      passed: `[P, N]` bool, true where a response passes.
      valid: `[P, N]` bool, false where the verifier failed, so that the sample does not count.
      scores: `[P, N]` float, what `evaluation.score` names: 1 for a pass, the reward, or a part of the verdict.
      score_name: that name.
      batches: the responses, as many prompts in each as were sampled together.
      truncated: fraction of responses that hit the length limit.
      mean_reward: mean over the valid responses; NaN without any.
      mean_length: mean number of response tokens.
      failures: the verifier's failures.
    """

    summary: dict[str, Json]
    passed: np.ndarray
    valid: np.ndarray
    scores: np.ndarray
    score_name: str
    batches: list[Rollouts]
    truncated: float
    mean_reward: float
    mean_length: float
    failures: Failures

    @property
    def score(self) -> float:
        """The held-out score that the run maximises: the mean of `scores`."""
        return self.summary["score"]["mean"]


def powers_of_two(n: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to n: the default values of k in pass@k."""
    return tuple(2**i for i in range(n.bit_length()))


def sample_rows(
    collect: Collector,
    weights: PyTree,
    rows: Sequence[Row],
    request: SampleRequest,
    *,
    prompts_per_batch: int,
    start: int = 0,
) -> Iterator[Rollouts]:
    """Sample and verify responses to each row from index `start` on, one batch at a time.

    The last batch is padded to `prompts_per_batch` prompts, so that all batches use the same compiled program.

    Args:
      collect: samples and verifies one batch.
      weights: from `Sampler.prepare`.
      rows: the problems.
      request: how to sample; `SEED_OFFSET` is added to its seed.
      prompts_per_batch: number of prompts in a batch.
      start: index of the first row.
    """
    request = dataclasses.replace(request, seed=request.seed + SEED_OFFSET)
    for first in range(start, len(rows), prompts_per_batch):
        batch = list(enumerate(rows[first : first + prompts_per_batch], first))
        yield collect(weights, batch, request, at_least=prompts_per_batch)


def evaluate_rows(
    collect: Collector,
    weights: PyTree,
    rows: Sequence[Row],
    request: SampleRequest,
    *,
    prompts_per_batch: int,
    ks: Sequence[int] = (),
    score: str = "pass",
) -> Evaluation:
    """Sample `request.num_responses` responses to each row, verify them, and estimate pass@k with 95% intervals.

    Args:
      request: how to sample; its seed is also that of the bootstrap.
      ks: the values of k; powers of two up to `request.num_responses` by default.
      score: what is maximised: "pass", "reward", or the name of a numeric part of the verdicts.

    The other arguments are those of `sample_rows`.

    Raises:
      VerifierFailed: the verifier failed on every response.
      UserError: no verdict has a part of that name.
    """
    batches = list(sample_rows(collect, weights, rows, request, prompts_per_batch=prompts_per_batch))
    found = failures(verdict for batch in batches for group in batch.verdicts for verdict in group)
    require_judged(found, "held-out evaluation")
    passed, valid, rewards = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("passed", "valid", "rewards")
    )
    scores = sample_scores(batches, score)
    summary = summarise(passed, valid, ks=ks or powers_of_two(request.num_responses), seed=request.seed)
    summary["score"] = {"name": score, **mean_score(scores, valid, request.seed)}
    lengths = np.concatenate([batch.responses.lengths for batch in batches])
    finished = np.concatenate([batch.responses.finished for batch in batches])
    return Evaluation(
        summary=summary,
        passed=passed,
        valid=valid,
        scores=scores,
        score_name=score,
        batches=batches,
        truncated=float(np.mean(~finished)),
        mean_reward=float(rewards[valid].mean()) if valid.any() else float("nan"),
        mean_length=float(lengths.mean()),
        failures=found,
    )


def sample_scores(batches: Sequence[Rollouts], name: str) -> np.ndarray:
    """Return the number `[P, N]` by which each sample is judged; arguments as in `evaluate_rows`.

    A verdict without the named part counts 0, as a response whose answer was never judged.

    Raises:
      UserError: no verdict has a numeric part of that name.
    """
    if name == "pass":
        return np.concatenate([batch.passed for batch in batches]).astype(np.float64)
    if name == "reward":
        return np.concatenate([batch.rewards for batch in batches]).astype(np.float64)
    groups = [group for batch in batches for group in batch.verdicts]
    numeric = {
        key for group in groups for v in group for key, part in v.parts.items() if isinstance(part, float)
    }
    if name not in numeric:
        raise UserError(
            f"evaluation.score = {name!r}: no verdict of the held-out evaluation has a number of that name"
            f"{nearest(name, numeric)}; known: {', '.join(('pass', 'reward', *sorted(numeric)))}"
        )
    return np.array([[float(v.parts.get(name, 0.0)) for v in group] for group in groups])
