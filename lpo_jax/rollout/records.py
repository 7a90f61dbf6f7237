"""Records of responses: the rows of `rollouts/` and `validation/`. `docs/records.md` describes them key by key.

Axes: P prompts · K responses · T response tokens.
"""

import hashlib
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from lpo_jax.rollout.collect import Rollouts
from lpo_jax.types import Tokenizer

# The largest number of response tokens in a file that get records of their own, which bounds the time and the space
# that a step of a large run spends on them.
TOKEN_BUDGET = 32_768
DIGITS = 4  # decimals of the numbers of a token


class TokenTexts(dict[int, str]):
    """The text of each token id as it appears inside a longer text, computed when it is first needed.

    A token that holds a part of a character is shown as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode

    def __missing__(self, token: int) -> str:
        # Some tokenizers drop the space of a text's first token.
        once, twice = (self._decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        self[token] = text = twice[len(once) :]
        return text


def response_records(rollouts: Rollouts, phase: str, behaviour_step: int | np.ndarray) -> list[dict]:
    """Return one record for each response, group by group, with verl's names where it has them.

    Args:
      phase: "train", or of a held-out evaluation "cold", "warm-started" or "step".
      behaviour_step: training steps that the weights which sampled the responses had behind them, for all or `[P, K]`.
    """
    responses = rollouts.responses
    behind = np.broadcast_to(behaviour_step, responses.lengths.shape)
    mean = lambda x: x.sum(-1, dtype=np.float64) / np.maximum(responses.lengths, 1)  # noqa: E731
    logp, entropy = mean(responses.log_probs), mean(responses.entropies)
    prompt_ids = [_prompt_id(rollouts, p) for p in range(len(logp))]
    return [
        {"phase": phase, "behaviour_step": int(behind[p, k]), "prompt_id": prompt_ids[p]}
        | record
        | {"logp": round(float(logp[p, k]), DIGITS), "entropy": round(float(entropy[p, k]), DIGITS)}
        for record, (p, k) in zip(rollouts.records(), np.ndindex(logp.shape))
    ]


def token_records(
    rollouts: Rollouts,
    texts: Mapping[int, str],
    arrays: Mapping[str, jax.Array | np.ndarray],
    budget: int = TOKEN_BUDGET,
) -> list[dict]:
    """Return the lists of the tokens of each response: texts, log-probs and entropies of the sampler, further numbers.

    Args:
      texts: of token ids.
      arrays: `[P, K, T]` numbers by key; T is at least the length of the longest response.
      budget: groups get lists, in their order, as long as all of their tokens fit; the records of others are empty.
    """
    responses = rollouts.responses
    left = budget - np.cumsum(responses.lengths.sum(-1))
    numbers = {"token_logp": responses.log_probs, "token_entropy": responses.entropies, **arrays}
    rounded = {
        name: x.astype(int) if x.dtype == bool else np.round(x.astype(np.float64), DIGITS)
        for name, x in numbers.items()
    }
    records = []
    for p, k in np.ndindex(responses.lengths.shape):
        lists = {name: x[p, k, : responses.lengths[p, k]].tolist() for name, x in rounded.items()}
        texts_of = [texts[token] for token in responses.ids(p, k)] if left[p] >= 0 else []
        records.append({"token_text": texts_of} | lists if left[p] >= 0 else {})
    return records


def evaluation_records(
    batches: Iterable[Rollouts], texts: Mapping[int, str], phase: str, behaviour_step: int
) -> list[dict]:
    """Return the records of a held-out evaluation; arguments as in `response_records` and `token_records`."""
    records, budget = [], TOKEN_BUDGET
    for batch in batches:
        of_tokens = token_records(batch, texts, {}, budget)
        records += [a | b for a, b in zip(response_records(batch, phase, behaviour_step), of_tokens)]
        budget -= int(batch.responses.lengths.sum())
    return records


def _prompt_id(rollouts: Rollouts, p: int) -> str:
    """Return an identity of a prompt's tokens and images, the same in all phases, steps and runs."""
    ids = rollouts.prompts[p, : rollouts.prompt_lengths[p]]
    digest = hashlib.sha256(ids.astype("<i4").tobytes())
    for image in rollouts.images[p]:
        digest.update(image.hash.encode())
    return digest.hexdigest()[:12]
