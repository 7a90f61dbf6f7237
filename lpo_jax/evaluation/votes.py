"""maj@k: whether the answer that most of a problem's k samples give is right.

Axes: P problems · N samples of a problem.
"""

import collections
from collections.abc import Sequence

import numpy as np


def majority(passed: np.ndarray, valid: np.ndarray, answers: Sequence[Sequence[str | None]]) -> np.ndarray:
    """Whether each problem's majority answer passes.

    Answers are the same when their texts are, whitespace aside. Two writings of one value are two answers: to call
    them one because both equal the gold answer would let the gold answer vote. A tie goes to the answer seen first. A
    sample without an answer votes for nothing, and one that could not be judged counts as not there. The verdict is
    that of the first sample with the answer.

    Args:
      passed, valid: `[P, N]` bool.
      answers: `[P][N]` texts as the verifier read them, None where there is none.

    Returns:
      `[P]` float64, 1 or 0 (a problem whose samples name no answer has none right); NaN where no sample is valid, and
      everywhere when no sample of any problem names an answer: then there was no vote (programs, say).
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
            # most_common sorts stably, so that of equal counts the first seen leads.
            winner = collections.Counter(answer for _, answer in ballots).most_common(1)[0][0]
            right[p] = passed[p, next(k for k, answer in ballots if answer == winner)]
    return np.where(valid.any(axis=1), right, np.nan)
