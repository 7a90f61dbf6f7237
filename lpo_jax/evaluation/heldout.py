"""Held-out evaluation on fixed problems with fixed random numbers, so that two evaluations can be paired."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from lpo_jax.evaluation.metrics import summarise
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
      records: one dict for each response, as written to `validation/<step>.jsonl`.
      truncated: fraction of responses that hit the length limit.
      mean_reward: mean over the valid responses; NaN without any.
      mean_length: mean number of response tokens.
      failures: the verifier's failures.
    """

    summary: dict[str, Json]
    passed: np.ndarray
    valid: np.ndarray
    records: list[dict]
    truncated: float
    mean_reward: float
    mean_length: float
    failures: Failures

    @property
    def score(self) -> float:
        """Held-out pass@1."""
        return self.summary["pass@1"]["mean"]


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
) -> Evaluation:
    """Sample `request.num_responses` responses to each row, verify them, and estimate pass@k with 95% intervals.

    Args:
      request: how to sample; its seed is also that of the bootstrap.
      ks: the values of k; powers of two up to `request.num_responses` by default.

    The other arguments are those of `sample_rows`.

    Raises:
      VerifierFailed: the verifier failed on every response.
    """
    batches = list(sample_rows(collect, weights, rows, request, prompts_per_batch=prompts_per_batch))
    found = failures(verdict for batch in batches for group in batch.verdicts for verdict in group)
    require_judged(found, "held-out evaluation")
    passed, valid, rewards = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("passed", "valid", "rewards")
    )
    lengths = np.concatenate([batch.responses.lengths for batch in batches])
    finished = np.concatenate([batch.responses.finished for batch in batches])
    return Evaluation(
        summary=summarise(passed, valid, ks=ks or powers_of_two(request.num_responses), seed=request.seed),
        passed=passed,
        valid=valid,
        records=[record for batch in batches for record in batch.records()],
        truncated=float(np.mean(~finished)),
        mean_reward=float(rewards[valid].mean()) if valid.any() else float("nan"),
        mean_length=float(lengths.mean()),
        failures=found,
    )
