"""Responses to task rows, sampled and verified: what training learns from and evaluation counts.

Axes: P prompts · K responses · T response tokens.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.evaluation.encode import encode_prompt
from lpo_jax.rewards import Verdict, VerifierPool
from lpo_jax.sampling import Responses, Sampler, Sampling
from lpo_jax.sampling.padding import pad_prompts
from lpo_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Collected:
    """One batch, row by row; lists are `[P]`, or `[P][K]` for responses."""

    ids: list[int]
    prompt_texts: list[str]
    prompts: np.ndarray  # [P, S]
    prompt_lengths: np.ndarray  # [P]
    responses: Responses
    texts: list[list[str]]
    verdicts: list[list[Verdict]]
    seconds_sampling: float
    seconds_verifying: float

    @property
    def rewards(self) -> np.ndarray:
        """`[P, K]` float32."""
        return np.array([[v.reward for v in group] for group in self.verdicts], np.float32)

    @property
    def passed(self) -> np.ndarray:
        """`[P, K]` bool."""
        return np.array([[v.outcome == "pass" for v in group] for group in self.verdicts])

    @property
    def valid(self) -> np.ndarray:
        """`[P, K]` bool: False where the verifier, not the response, failed."""
        return np.array([[not v.masked for v in group] for group in self.verdicts])

    def records(self) -> list[dict]:
        """One dict a response, group by group, under verl's names where it has them."""
        return [
            {
                "id": row_id,
                "k": k,
                "input": prompt,
                "output": text,
                "score": verdict.reward,
                "outcome": verdict.outcome,
                "parts": verdict.parts,
                "tokens": int(self.responses.lengths[p, k]),
                "finished": bool(self.responses.finished[p, k]),
            }
            for p, (row_id, prompt) in enumerate(zip(self.ids, self.prompt_texts))
            for k, (text, verdict) in enumerate(zip(self.texts[p], self.verdicts[p]))
        ]


@dataclasses.dataclass(frozen=True)
class Collector:
    """Samples with one model and task; `weights` come from `sampler.prepare`."""

    task: Task
    tokenizer: Any
    sampler: Sampler
    pool: VerifierPool
    max_prompt_tokens: int

    def __call__(
        self,
        weights: Any,
        rows: Sequence[tuple[int, dict]],
        *,
        num_responses: int,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        step: int,
        stop: Sequence[str] = (),
        pad_to: int = 0,
    ) -> Collected:
        """Samples `num_responses` to each `(id, row)` and verifies them.

        Args:
          pad_to: at least this many prompts are given to the sampler (the rest are empty), so that a last,
            smaller batch needs no program of its own.
        """
        started = time.perf_counter()
        ids = [encode_prompt(self.task, self.tokenizer, row) for _, row in rows]
        missing = max(0, pad_to - len(ids))
        prompts, lengths = pad_prompts(ids + [[0]] * missing, self.max_prompt_tokens)
        sampled = self.sampler(
            weights,
            prompts,
            lengths,
            np.array([row_id for row_id, _ in rows] + [0] * missing, np.uint32),
            num_responses=num_responses,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            step=step,
            stop=stop,
            active=np.arange(len(prompts)) < len(ids),
        )
        P = len(ids)
        responses = Responses(*(getattr(sampled, f.name)[:P] for f in dataclasses.fields(sampled)))
        texts = [
            [
                self.tokenizer.decode(responses.ids(p, k), skip_special_tokens=True)
                for k in range(num_responses)
            ]
            for p in range(P)
        ]
        sampled_at = time.perf_counter()
        verdicts = self.pool.verify(
            [text for group in texts for text in group],
            [row for _, row in rows for _ in range(num_responses)],
        )
        return Collected(
            ids=[row_id for row_id, _ in rows],
            prompt_texts=[self.tokenizer.decode(row) for row in ids],
            prompts=prompts[:P],
            prompt_lengths=lengths[:P],
            responses=responses,
            texts=texts,
            verdicts=[verdicts[p * num_responses : (p + 1) * num_responses] for p in range(P)],
            seconds_sampling=sampled_at - started,
            seconds_verifying=time.perf_counter() - sampled_at,
        )


def within_limit(task: Task, tokenizer: Any, rows: Sequence[dict], limit: int, drop: bool, what: str):
    """The rows whose prompts fit, and how many do not.

    Raises:
      UserError: some do not fit and `drop` is off, or none is left.
    """
    lengths = [len(encode_prompt(task, tokenizer, row)) for row in rows]
    kept = [row for row, length in zip(rows, lengths) if length <= limit]
    long = len(rows) - len(kept)
    if long and not drop:
        first = next(i for i, length in enumerate(lengths) if length > limit)
        raise UserError(
            f"{what} row {first}: its prompt has {lengths[first]} tokens, more than sampling.max_prompt_tokens = "
            f"{limit} ({long} such rows); raise the limit or set sampling.overlong_prompts to drop"
        )
    if not kept:
        raise UserError(f"{what}: no row has a prompt of at most {limit} tokens (sampling.max_prompt_tokens)")
    return kept, long
