"""The result of sampling: responses on the host, finished or as far as they have been drawn.

Axes: P prompts · K responses · T response tokens.
"""

import base64
import dataclasses
import io
from collections.abc import Sequence

import numpy as np

from lpo_jax.sampling.padding import pad_to


@dataclasses.dataclass(frozen=True)
class Responses:
    """Sampled responses, on the host.

    Attributes:
      tokens: `[P, K, T]` int32, T the length of the longest response; 0 behind a response's end.
      log_probs: `[P, K, T]` float32, under the distribution that was sampled from; 0 behind a response's end.
      entropies: `[P, K, T]` float32, of that distribution at each token, in nats; 0 behind a response's end.
      versions: `[P, K, T]` int32, the `SampleRequest.step` that drew each token, which identifies the weights; 0 behind
        a response's end.
      lengths: `[P, K]` int32, the end token included.
      finished: `[P, K]` bool, true if an end token or a stop string ended the response, false if its budget did, or if
        it is still in flight (`Ahead`).
      row_steps: `[P, K]` float32, decode steps that the device spent on this response, its share of the steps of idle
        slots included.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray
    versions: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    row_steps: np.ndarray

    @classmethod
    def empty(cls, P: int, K: int, T: int) -> "Responses":
        """Return P x K responses without a token, with capacity for T tokens each."""
        of_tokens = [np.zeros((P, K, T), dtype) for dtype in (np.int32, np.float32, np.float32, np.int32)]
        return cls(*of_tokens, *(np.zeros((P, K), dtype) for dtype in (np.int32, bool, np.float32)))

    @property
    def mask(self) -> np.ndarray:
        """`[P, K, T]` bool, true at response tokens, the end token included."""
        return np.arange(self.tokens.shape[-1]) < self.lengths[..., None]

    def take(self, prompts: np.ndarray) -> "Responses":
        """Return the responses to some prompts, in the given order."""
        return Responses(*(x[prompts] for x in vars(self).values()))

    def ids(self, p: int, k: int) -> list[int]:
        """Return the token ids of one response, without padding."""
        return self.tokens[p, k, : self.lengths[p, k]].tolist()

    def resized(self, T: int) -> "Responses":
        """Return the responses with the last axis cut or padded to T tokens, at least the longest length."""
        fit = lambda x: pad_to(x[..., :T], T) if x.ndim == 3 else x  # noqa: E731
        return Responses(*map(fit, vars(self).values()))

    def trimmed(self) -> "Responses":
        """Return the responses with T the longest length, at least 1."""
        return self.resized(max(1, int(self.lengths.max(initial=0))))

    def to_text(self) -> str:
        """Return the arrays as text, exactly, for a JSON file."""
        file = io.BytesIO()
        np.savez_compressed(file, **vars(self))
        return base64.b64encode(file.getvalue()).decode()

    @classmethod
    def from_text(cls, text: str) -> "Responses":
        """Return the responses that `to_text` has written."""
        with np.load(io.BytesIO(base64.b64decode(text))) as arrays:
            return cls(**arrays)


def concatenate_responses(batches: Sequence[Responses]) -> Responses:
    """Concatenate responses of equal K over the prompts; tokens are padded to the longest."""
    T = max(batch.tokens.shape[-1] for batch in batches)
    padded = [vars(batch.resized(T)) for batch in batches]
    return Responses(**{name: np.concatenate([x[name] for x in padded]) for name in padded[0]})


@dataclasses.dataclass(frozen=True)
class Ahead:
    """Which prompts of a batch belong to later steps, and what earlier calls have drawn already.

    The prompts of later steps take the slots that would be idle while the last responses of the first prompts are
    sampled. Their responses are returned as far as they are drawn, and passed in again as `started`.

    Attributes:
      rounds: number of equal parts that the prompts divide into, in order: those of this step, of the next, and so on.
        Sampling ends with the last response to the first part.
      steps: `[P]` uint32, folded into the seed for each prompt in place of `SampleRequest.step`.
      started: the responses so far.
    """

    rounds: int
    steps: np.ndarray
    started: Responses
