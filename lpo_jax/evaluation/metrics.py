"""Unbiased pass@k with confidence intervals over problems, in plain numpy.

Axis letters: `P` problems, `N` samples of a problem, `B` bootstrap resamples.

The problem is the unit of resampling, because samples of one problem are not independent. A sample whose
verifier failed is not a wrong answer: it is masked, and a problem left with fewer than k valid samples has no
pass@k. Such problems are left out of that k, and the number that remains is reported beside the mean.
"""

from collections.abc import Iterable, Sequence

import numpy as np

_CONFIDENCE = 0.95
_BLOCK = 2_000_000  # indices drawn at a time, which bounds memory on benchmarks with thousands of problems


def pass_at_k(n, c, k: int) -> np.ndarray:
    """Chance that at least one of k samples, drawn without replacement from n of which c pass, passes.

    `1 - C(n-c, k) / C(n, k)`, as a product of k ratios so that no factorial can overflow. It is unbiased for
    the chance of success in k fresh samples, is `c / n` at k = 1 and "any of them passed" at k = n.

    Args:
        n: number of valid samples of each problem, any shape.
        c: how many of them pass, the same shape.
        k: samples allowed, at least 1.

    Returns:
        float64 array of the common shape; NaN where n < k.

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

    Where all values are the same v the bootstrap would answer with an interval of no width, though no
    success in 20 problems does not mean that success is impossible. There the exact bound is given instead:
    unless a chance of 1 in 40 came true, a value seen P times in a row has a probability above
    q = 0.025 ** (1 / P), so the mean lies between `q v + (1 - q) low` and `q v + (1 - q) high`. For v = 0
    that is the Clopper-Pearson bound.

    With few problems (fewer than about 20) percentile intervals are somewhat too narrow.

    Args:
        values: one number for each problem [P]; no NaN.
        low: smallest value possible.
        high: largest value possible.
        n_boot: number of resamples B.
        seed: of a generator of its own; numpy's global one is not touched.

    Returns:
        (lower, upper); NaN for no values.
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


def summarise(
    outcomes, valid=None, ks: Iterable[int] = (1,), n_boot: int = 2000, seed: int = 0
) -> dict[str, object]:
    """pass@k of one evaluation, each with its 95% interval over problems.

    Args:
        outcomes: [P, N] flags, true where the sample passes.
        valid: [P, N] mask of samples that count; all of them when None.
        ks: the k values wanted; those above N are refused.
        n_boot: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        A dict that JSON can hold: `ks`, `problems`, `samples` (valid ones), `invalid_samples`,
        `samples_per_problem` (N), `mean` (share of valid samples that pass, mean over problems), and for each
        k `"pass@k": {"mean", "ci_low", "ci_high", "problems"}`. Means over no problem are NaN.
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
        values = _per_problem(outcomes, valid, k)
        low, high = bootstrap_interval(values[~np.isnan(values)], n_boot=n_boot, seed=seed)
        summary[f"pass@{k}"] = {
            "mean": _mean(values),
            "ci_low": low,
            "ci_high": high,
            "problems": int((~np.isnan(values)).sum()),
        }
    return summary


def paired_difference(
    before,
    after,
    valid_before=None,
    valid_after=None,
    ks: Iterable[int] = (1,),
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How pass@k changed between two evaluations of the same problems, in the same order.

    Problems are resampled in pairs, so that their differing difficulty cancels. A problem counts for k only
    where both evaluations have k valid samples. The numbers of samples may differ.

    Args:
        before: [P, N] flags of the first evaluation.
        after: [P, M] flags of the second.
        valid_before: mask of `before`.
        valid_after: mask of `after`.
        ks: the k values wanted.
        n_boot: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        For each k `"pass@k": {"mean", "ci_low", "ci_high", "problems"}`, where `mean` is after minus before.
    """
    before, valid_before = _checked(before, valid_before)
    after, valid_after = _checked(after, valid_after)
    if len(before) != len(after):
        raise ValueError(f"paired evaluations need the same problems, got {len(before)} and {len(after)}")
    differences = {}
    for k in _checked_ks(ks, min(before.shape[1], after.shape[1])):
        change = _per_problem(after, valid_after, k) - _per_problem(before, valid_before, k)
        change = change[~np.isnan(change)]
        low, high = bootstrap_interval(change, low=-1.0, n_boot=n_boot, seed=seed)
        differences[f"pass@{k}"] = {
            "mean": _mean(change),
            "ci_low": low,
            "ci_high": high,
            "problems": change.size,
        }
    return differences


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
        raise ValueError(f"k must lie between 1 and the {samples} samples of a problem, got {ks}")
    return ks
