"""maj@k: whether the most frequent answer among a problem's k samples is correct.

Axes: P problems · N samples of a problem.
"""

import collections
from collections.abc import Sequence

import numpy as np


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
