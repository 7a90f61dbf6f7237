"""Unbiased pass@k with confidence intervals over problems, in NumPy.

Axes: P problems · N samples of a problem · B bootstrap resamples.

The bootstrap resamples problems, because samples of one problem are not independent. A sample on which the
verifier failed is masked, not counted as wrong. A problem with fewer than k valid samples has no pass@k; it is
excluded for that k, and the number of remaining problems is reported with the mean.
"""

import collections
from collections.abc import Iterable, Sequence

import numpy as np

from lpo_jax.types import Json

_CONFIDENCE = 0.95
_BLOCK = 2_000_000  # indices drawn at a time; bounds memory on benchmarks with thousands of problems


def pass_at_k(n, c, k: int) -> np.ndarray:
    """Probability that at least one of k samples passes, drawn without replacement from n samples of which c pass.

    `1 - C(n-c, k) / C(n, k)`, computed as a product of k ratios, which cannot overflow. This is an unbiased
    estimate of the probability that at least one of k new samples passes. It equals `c / n` for k = 1.

    Args:
        n: number of valid samples of each problem, any shape.
        c: number of passing samples, any shape that broadcasts with `n`.
        k: number of samples drawn, at least 1.

    Returns:
        float64 array of the broadcast shape; NaN where n < k.

    Raises:
        ValueError: k < 1, or c is not between 0 and n.

    References:
        Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    n, c = np.broadcast_arrays(np.asarray(n, np.int64), np.asarray(c, np.int64))
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if np.any((c < 0) | (c > n)):
        raise ValueError("the number of passing samples must lie between 0 and the number of samples")
    drawn = np.arange(k)
    enough = (n >= k)[..., None]
    left = np.where(enough, n[..., None] - drawn, 1)
    all_fail = np.prod(np.maximum((n - c)[..., None] - drawn, 0) / left, axis=-1)
    return np.where(enough[..., 0], 1.0 - all_fail, np.nan)


def bootstrap_interval(
    values, low: float = 0.0, high: float = 1.0, n_boot: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile bootstrap interval for the mean of `values` [P], which lie in [low, high].

    If all values are equal to v, the bootstrap interval would have zero width, although 0 successes on 20
    problems do not imply that success is impossible. In this case an exact bound is returned: with confidence
    97.5%, a value observed P times out of P has a probability above q = 0.025 ** (1 / P), so the mean lies
    between `q v + (1 - q) low` and `q v + (1 - q) high`. For v = 0 this is the Clopper-Pearson bound.

    With fewer than about 20 problems, percentile intervals are slightly too narrow.

    Args:
        values: one number for each problem [P], without NaN.
        low: the smallest possible value.
        high: the largest possible value.
        n_boot: number of resamples B.
        seed: of the random number generator; NumPy's global generator is not used.

    Returns:
        (lower, upper); NaN if there are no values.
    """
    values = np.asarray(values, np.float64)
    count = values.size
    if count == 0:
        return float("nan"), float("nan")
    tail = (1.0 - _CONFIDENCE) / 2
    if np.ptp(values) < 1e-12:
        seen = tail ** (1.0 / count)
        return float(seen * values[0] + (1 - seen) * low), float(seen * values[0] + (1 - seen) * high)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    means = np.concatenate(
        [
            values[rng.integers(count, size=(min(block, n_boot - start), count))].mean(axis=1)  # [B]
            for start in range(0, n_boot, block)
        ]
    )
    lower, upper = np.quantile(means, [tail, 1 - tail])
    return float(lower), float(upper)


def with_interval(values: np.ndarray, **options: Json) -> dict[str, float]:
    """Return the mean of `values [P]`, its interval and the number of values. NaN values are excluded.

    Args:
      values: one number for each problem.
      **options: see `bootstrap_interval`.
    """
    values = values[~np.isnan(values)]
    low, high = bootstrap_interval(values, **options)
    return {"mean": _mean(values), "ci_low": low, "ci_high": high, "problems": values.size}


def summarise(
    outcomes, valid=None, ks: Iterable[int] = (1,), n_boot: int = 2000, seed: int = 0
) -> dict[str, object]:
    """Compute pass@k of one evaluation with 95% intervals over problems.

    Args:
        outcomes: [P, N] flags, true where the sample passes.
        valid: [P, N] mask of the samples that count; all of them if None.
        ks: the values of k, each between 1 and N.
        n_boot: number of bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        A dict of JSON values: `ks`, `problems`, `samples` (the number of valid ones), `invalid_samples`,
        `samples_per_problem` (N), `mean` (fraction of valid samples that pass, mean over problems), and for each
        k `"pass@k": {"mean", "ci_low", "ci_high", "problems"}`. A mean over zero problems is NaN.

    Raises:
        ValueError: the shapes do not match, outcomes are not flags, or a k is out of range.
    """
    outcomes, valid = _checked(outcomes, valid)
    ks = _checked_ks(ks, outcomes.shape[1])
    summary = {
        "ks": ks,
        "problems": outcomes.shape[0],
        "samples": int(valid.sum()),
        "invalid_samples": int((~valid).sum()),
        "samples_per_problem": outcomes.shape[1],
        "mean": _mean(_per_problem(outcomes, valid, 1)),
    }
    for k in ks:
        summary[f"pass@{k}"] = with_interval(_per_problem(outcomes, valid, k), n_boot=n_boot, seed=seed)
    return summary


def mean_score(scores, valid, seed: int = 0) -> dict[str, float]:
    """Compute the mean of one number per sample, with a 95% interval over problems.

    Args:
        scores: [P, N] numbers; invalid samples may hold any.
        valid: [P, N] mask of the samples that count.
        seed: of the bootstrap.

    Returns:
        `{"mean", "ci_low", "ci_high", "problems"}`: the mean over problems of the mean over a problem's valid samples.
    """
    values = _problem_means(scores, valid)
    values = values[~np.isnan(values)]
    bounds = (float(scores[valid].min()), float(scores[valid].max())) if valid.any() else (0.0, 1.0)
    low, high = bootstrap_interval(values, min(0.0, bounds[0]), max(1.0, bounds[1]), seed=seed)
    return {"mean": _mean(values), "ci_low": low, "ci_high": high, "problems": values.size}


def score_difference(before, after, valid_before, valid_after, seed: int = 0) -> dict[str, float]:
    """Compute the change of `mean_score` between two evaluations of the same problems in the same order.

    Args:
        before, after: [P, N] and [P, M] numbers.
        valid_before, valid_after: masks of the samples that count.
        seed: of the bootstrap.

    Returns:
        `{"mean", "ci_low", "ci_high", "problems"}`, where `mean` is after minus before.
    """
    change = _problem_means(after, valid_after) - _problem_means(before, valid_before)
    change = change[~np.isnan(change)]
    reach = max(1.0, float(np.abs(change).max(initial=0.0)))
    low, high = bootstrap_interval(change, -reach, reach, seed=seed)
    return {"mean": _mean(change), "ci_low": low, "ci_high": high, "problems": change.size}


def paired_difference(
    before,
    after,
    valid_before=None,
    valid_after=None,
    ks: Iterable[int] = (1,),
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Compute the change of pass@k between two evaluations of the same problems in the same order.

    The bootstrap resamples per-problem differences, so that differences in difficulty cancel. A problem counts
    for k only if both evaluations have at least k valid samples of it. N and M may differ.

    Args:
        before: [P, N] flags of the first evaluation.
        after: [P, M] flags of the second evaluation.
        valid_before: [P, N] mask of `before`; all samples count if None.
        valid_after: [P, M] mask of `after`; all samples count if None.
        ks: the values of k, each between 1 and min(N, M).
        n_boot: number of bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        For each k `"pass@k": {"mean", "ci_low", "ci_high", "problems"}`, where `mean` is after minus before.

    Raises:
        ValueError: the numbers of problems differ, or as in `summarise`.
    """
    before, valid_before = _checked(before, valid_before)
    after, valid_after = _checked(after, valid_after)
    if len(before) != len(after):
        raise ValueError(f"paired evaluations need the same problems, got {len(before)} and {len(after)}")
    differences = {}
    for k in _checked_ks(ks, min(before.shape[1], after.shape[1])):
        change = _per_problem(after, valid_after, k) - _per_problem(before, valid_before, k)
        differences[f"pass@{k}"] = with_interval(change, low=-1.0, n_boot=n_boot, seed=seed)
    return differences


def _problem_means(scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean over the valid samples of each problem [P]; NaN without any."""
    counts = valid.sum(axis=1)
    return np.where(counts > 0, np.where(valid, scores, 0.0).sum(axis=1) / np.maximum(counts, 1), np.nan)


def _per_problem(outcomes: np.ndarray, valid: np.ndarray, k: int) -> np.ndarray:
    return pass_at_k(valid.sum(axis=1), (outcomes & valid).sum(axis=1), k)


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _checked(outcomes, valid) -> tuple[np.ndarray, np.ndarray]:
    outcomes = np.asarray(outcomes)
    valid = np.ones(outcomes.shape, bool) if valid is None else np.asarray(valid, bool)
    if outcomes.ndim != 2 or valid.shape != outcomes.shape:
        raise ValueError(f"outcomes and valid must be [P, N], got {outcomes.shape} and {valid.shape}")
    if np.any((outcomes != 0) & (outcomes != 1) & valid):
        raise ValueError("outcomes must be flags (pass or not), not rewards")
    return outcomes == 1, valid


def _checked_ks(ks: Iterable[int], samples: int) -> Sequence[int]:
    ks = sorted({int(k) for k in ks})
    if not ks or ks[0] < 1 or ks[-1] > samples:
        raise ValueError(f"k must lie between 1 and the {samples} samples of each problem, got {ks}")
    return ks


def majority(passed: np.ndarray, valid: np.ndarray, answers: Sequence[Sequence[str | None]]) -> np.ndarray:
    """Return whether each problem's majority answer passes.

    Answers are compared as text without whitespace. Two notations of the same value are different answers: merging
    them because both equal the gold answer would leak the gold answer into the vote. A tie goes to the answer that
    occurs first. Samples without an answer do not vote, and invalid samples are ignored. The verdict on an answer is
    that of the first sample that gives it.

    Args:
      passed: `[P, N]` bool, true where a sample passes.
      valid: `[P, N]` bool, false where the verifier failed.
      answers: `[P][N]` answer texts as extracted by the verifier; None without an answer.

    Returns:
      `[P]` float64, 1 where the majority answer passes and 0 elsewhere, also where no sample has an answer. NaN where
      no sample is valid. All NaN if no sample of any problem has an answer, as with programs: then there is no vote.
    """
    votes = [
        [(k, "".join(answer.split())) for k, answer in enumerate(group) if valid[p, k] and answer]
        for p, group in enumerate(answers)
    ]
    if not any(votes):
        return np.full(len(votes), np.nan)
    right = np.zeros(len(votes))
    for p, ballots in enumerate(votes):
        if ballots:
            # most_common sorts stably: of answers with equal counts it returns the one that occurs first.
            winner = collections.Counter(answer for _, answer in ballots).most_common(1)[0][0]
            right[p] = passed[p, next(k for k, answer in ballots if answer == winner)]
    return np.where(valid.any(axis=1), right, np.nan)
