"""Sampling and verification of responses to task rows, for training and for evaluation.

Axes: P prompts · K responses · T response tokens.
"""

import dataclasses
import hashlib
import time
from array import array
from collections.abc import Sequence

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.models.prompt_images import Images
from lpo_jax.parallel import hosts
from lpo_jax.rewards import Verdict, VerifierPool
from lpo_jax.rollout.encode import encode_images, encode_prompt, prompt_text
from lpo_jax.rollout.failures import Failures, failures
from lpo_jax.sampling import Ahead, PromptBatch, Responses, Sampler, SampleRequest
from lpo_jax.sampling.padding import NO_LIMIT, pad_prompts, pad_to
from lpo_jax.sampling.responses import concatenate_responses
from lpo_jax.sampling.text import response_text
from lpo_jax.tasks import Row, Task
from lpo_jax.tasks.images import EncodedImage, row_images, without_images
from lpo_jax.types import PyTree, Tokenizer


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Sampled and verified responses to a batch of rows. Lists are `[P]`, or `[P][K]` for responses."""

    ids: list[int]
    golds: list[str | None]  # reference answers, for readers
    prompt_texts: list[str]
    images: list[list[EncodedImage]]  # of each prompt
    patches: list[Images]  # these images as the model reads them
    prompts: np.ndarray  # [P, S]
    prompt_lengths: np.ndarray  # [P]
    responses: Responses
    texts: list[list[str]]
    verdicts: list[list[Verdict]]
    seconds_sampling: float
    seconds_verifying: float  # after the last token: what sampling did not hide
    rescore: bool = (
        False  # some response was not sampled from its prompt: the trainer must compute the log-probs
    )
    ahead: Responses | None = None  # the responses so far to prompts of later steps

    @property
    def rewards(self) -> np.ndarray:
        """Rewards `[P, K]`, float32."""
        return np.array([[v.reward for v in group] for group in self.verdicts], np.float32)

    @property
    def passed(self) -> np.ndarray:
        """Whether a response passed, `[P, K]` bool."""
        return np.array([[v.outcome == "pass" for v in group] for group in self.verdicts])

    @property
    def malformed(self) -> np.ndarray:
        """Whether a response has no answer in the required form, `[P, K]` bool."""
        return np.array([[v.outcome == "malformed" for v in group] for group in self.verdicts])

    @property
    def valid(self) -> np.ndarray:
        """Whether a response was judged, `[P, K]` bool; False if the verifier itself failed."""
        return np.array([[not v.masked for v in group] for group in self.verdicts])

    @property
    def failures(self) -> Failures:
        """The responses that could not be judged, by reason."""
        return failures(verdict for group in self.verdicts for verdict in group)

    def take(self, prompts: Sequence[int]) -> "Rollouts":
        """Select groups by index, in the given order."""
        some = np.asarray(prompts, int)
        of = lambda items: [items[p] for p in some]  # noqa: E731
        return dataclasses.replace(
            self,
            ids=of(self.ids),
            golds=of(self.golds),
            prompt_texts=of(self.prompt_texts),
            images=of(self.images),
            patches=of(self.patches),
            prompts=self.prompts[some],
            prompt_lengths=self.prompt_lengths[some],
            responses=self.responses.take(some),
            texts=of(self.texts),
            verdicts=of(self.verdicts),
        )

    def records(self) -> list[dict]:
        """Return one dict for each response, group by group, with verl's names where it has them."""
        return [
            {
                "id": row_id,
                "k": k,
                "input": prompt,
                "output": text,
                "gts": self.golds[p],
                "score": verdict.reward,
                "outcome": verdict.outcome,
                "parts": verdict.parts,
                "tokens": int(self.responses.lengths[p, k]),
                "finished": bool(self.responses.finished[p, k]),
            }
            | ({"images": [image.reference() for image in self.images[p]]} if self.images[p] else {})
            for p, (row_id, prompt) in enumerate(zip(self.ids, self.prompt_texts))
            for k, (text, verdict) in enumerate(zip(self.texts[p], self.verdicts[p]))
        ]


def concatenate(batches: Sequence[Rollouts]) -> Rollouts:
    """Concatenate rollouts of equal K; prompts and responses are padded to the longest."""
    S = max(batch.prompts.shape[-1] for batch in batches)
    return Rollouts(
        ids=[x for batch in batches for x in batch.ids],
        golds=[x for batch in batches for x in batch.golds],
        prompt_texts=[x for batch in batches for x in batch.prompt_texts],
        images=[x for batch in batches for x in batch.images],
        patches=[x for batch in batches for x in batch.patches],
        prompts=np.concatenate([pad_to(batch.prompts, S) for batch in batches]),
        prompt_lengths=np.concatenate([batch.prompt_lengths for batch in batches]),
        responses=concatenate_responses([batch.responses for batch in batches]),
        texts=[x for batch in batches for x in batch.texts],
        verdicts=[x for batch in batches for x in batch.verdicts],
        seconds_sampling=sum(batch.seconds_sampling for batch in batches),
        seconds_verifying=sum(batch.seconds_verifying for batch in batches),
        rescore=any(batch.rescore for batch in batches),
    )


def replace_response(batch: Rollouts, p: int, k: int, source: Rollouts, q: int, j: int) -> Rollouts:
    """Replace response (p, k) of a batch by response (q, j) of another; the prompt stays."""
    both = concatenate([batch, source.take([q])])
    fields = {name: x[:-1].copy() for name, x in vars(both.responses).items()}
    for name, x in vars(both.responses).items():
        fields[name][p, k] = x[-1, j]
    texts, verdicts = ([list(group) for group in groups[:-1]] for groups in (both.texts, both.verdicts))
    texts[p][k], verdicts[p][k] = source.texts[q][j], source.verdicts[q][j]
    kept = both.take(range(len(batch.ids)))
    return dataclasses.replace(kept, responses=Responses(**fields), texts=texts, verdicts=verdicts)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Collector:
    """Samples and verifies responses with one model and one task."""

    task: Task
    tokenizer: Tokenizer
    sampler: Sampler
    pool: VerifierPool
    max_prompt_tokens: int

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a response, or of its first tokens, as the verifier receives it."""
        return response_text(self.tokenizer, ids, self.sampler.eos_ids)

    def __call__(
        self,
        weights: PyTree,
        rows: Sequence[tuple[int, Row]],
        request: SampleRequest,
        *,
        prompts: Sequence[list[int]] | None = None,
        written: Sequence[str] | None = None,
        at_least: int = 0,
        ahead: Ahead | None = None,
    ) -> Rollouts:
        """Sample `request.num_responses` responses to each row and verify them.

        Args:
          weights: from `sampler.prepare`.
          rows: pairs of id and row; random numbers depend on the id.
          request: settings of the sampler.
          prompts: token ids to continue instead of the rows' own prompts.
          written: for each row, the text of the response that its prompt already contains; the verifier receives it
            before the sampled text.
          at_least: see `Sampler`.
          ahead: see `Sampler`. Only the rows of the first round are verified and returned; the responses so far of the
            others are `Rollouts.ahead`.
        """
        started = time.perf_counter()
        hosts.phase("sampling")
        ids = prompts or [encode_prompt(self.task, self.tokenizer, row) for _, row in rows]
        patches = [encode_images(self.tokenizer, row) for _, row in rows]
        # Extended prompts are padded to a power of two, which bounds the number of compiled programs.
        limit = self.max_prompt_tokens if max(map(len, ids)) <= self.max_prompt_tokens else NO_LIMIT
        padded, lengths = pad_prompts(ids, limit)
        P, K = len(ids) // (ahead.rounds if ahead else 1), request.num_responses
        own = range(P)[hosts.share(P)]  # each host decodes and verifies its share
        texts = [[""] * K for _ in own]
        handed_in: list[tuple[int, int]] = []
        written = written or [""] * P
        with self.pool.judging() as job:

            def hand_in(p: int, k: int, token_ids: list[int]) -> None:
                """Submit a finished response to the verifiers while others are still sampled."""
                if p in own:
                    text = self.text(token_ids)
                    texts[p - own.start][k] = text
                    handed_in.append((p - own.start, k))
                    job.submit(written[p] + text, without_images(rows[p][1]))

            sampled = self.sampler(
                weights,
                PromptBatch(padded, lengths, np.array([row_id for row_id, _ in rows], np.uint32), patches),
                request,
                at_least=at_least,
                on_finished=hand_in,
                ahead=ahead,
            )
            sampled_at = time.perf_counter()
            hosts.phase("verifying")
        judged = dict(zip(handed_in, job.verdicts))
        verdicts = [judged[p, k] for p in range(len(own)) for k in range(K)]
        texts, verdicts = hosts.gather_lists(texts), hosts.gather_lists(verdicts)
        return Rollouts(
            ids=[row_id for row_id, _ in rows[:P]],
            golds=[self.task.gold(row) for _, row in rows[:P]],
            prompt_texts=[prompt_text(self.tokenizer, row) for row in ids[:P]],
            images=[row_images(row) for _, row in rows[:P]],
            patches=patches[:P],
            prompts=padded[:P],
            prompt_lengths=lengths[:P],
            responses=sampled.take(np.arange(P)).trimmed(),
            texts=texts,
            verdicts=[verdicts[p * K : (p + 1) * K] for p in range(P)],
            seconds_sampling=sampled_at - started,
            seconds_verifying=time.perf_counter() - sampled_at,
            ahead=sampled.take(np.arange(P, len(ids))) if ahead else None,
        )


def within_limit(
    task: Task,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    limit: int,
    drop: bool,
    what: str,
    settings: tuple[str, str] = ("sampling.max_prompt_tokens", "sampling.overlong_prompts"),
):
    """Return the rows whose prompts fit, the number that do not fit, and the SHA-256 of the token ids of all prompts.

    Args:
      settings: the names of the settings that `limit` and `drop` come from, for messages.

    Raises:
      UserError: a prompt cannot be encoded, some do not fit and `drop` is off, or none is left.
    """
    if not len(rows):
        raise UserError(f"{what}: task {task.name} has none; give it a path to train on")
    digest, lengths = hashlib.sha256(), []
    for index, row in enumerate(rows):
        try:
            ids = encode_prompt(task, tokenizer, row)
        except UserError as error:
            raise UserError(f"{what} row {index}: {error}") from None
        digest.update(array("I", [len(ids), *ids]).tobytes())
        lengths.append(len(ids))
    long = sum(length > limit for length in lengths)
    # Where all fit they stay where they are, which may be on disk.
    kept = [row for row, length in zip(rows, lengths) if length <= limit] if long else rows
    if long and not drop:
        first = next(i for i, length in enumerate(lengths) if length > limit)
        raise UserError(
            f"{what} row {first}: its prompt has {lengths[first]} tokens, more than {settings[0]} = "
            f"{limit} ({long} such rows); raise the limit or set {settings[1]} to drop"
        )
    if not kept:
        raise UserError(f"{what}: no row has a prompt of at most {limit} tokens ({settings[0]})")
    return kept, long, digest.hexdigest()
