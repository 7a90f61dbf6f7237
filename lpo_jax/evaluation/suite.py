"""Evaluation of one model on a suite of benchmarks: pass@1 (as avg@k), pass@k and maj@k, and a file of all responses.

Axes: P problems · K samples of a problem.

An evaluation that was killed is resumed by the same command and gives the same results: the random numbers of a sample
depend only on the seed, the problem's index and k; all batches have the same shape; and scores are always computed from
the file of responses.
"""

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lpo_jax.errors import UserError, VerifierFailed
from lpo_jax.evaluation.heldout import powers_of_two, sample_rows
from lpo_jax.evaluation.metrics import majority, summarise, with_interval
from lpo_jax.evaluation.responses import ResponseFile, ResponseSummary
from lpo_jax.rewards import VerifierPool, VerifierSpec
from lpo_jax.rewards.user_code import file_hash, split_reference
from lpo_jax.rollout.collect import Collector, within_limit
from lpo_jax.rollout.failures import Failures, require_judged, warning
from lpo_jax.sampling import Sampler, SampleRequest, Sampling
from lpo_jax.tasks import Task
from lpo_jax.tasks.benchmarks import Benchmark
from lpo_jax.tasks.data import content_hash
from lpo_jax.types import Json, PyTree, Tokenizer

DEFAULT_BATCH = 64  # responses sampled together by default
VERIFIER_SECONDS = 10.0  # time limit for one response
# If all responses to this many problems are masked, the verifier is broken, not a single row.
ENOUGH_PROBLEMS = 8
_FILE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that apply to all benchmarks of a suite.

    Attributes:
      num_responses: K; 0 takes the benchmark's own value.
      temperature: sampling temperature. 0.6 is the LPO paper's value; 0 is greedy decoding.
      top_p: probability mass of nucleus sampling.
      max_tokens: the largest number of response tokens.
      max_prompt_tokens: the largest number of prompt tokens; 0 takes the model's positions minus `max_tokens`.
      overlong_prompts: "error" raises on longer prompts, "drop" excludes and counts them.
      stop: strings that end a response.
      problems: evaluate only this many problems, from the start of the benchmark; 0 takes all.
      batch: prompts sampled together; 0 chooses it such that a batch has about `DEFAULT_BATCH` responses.
      chat: whether to apply the model's chat template; None takes the benchmark's own setting.
      template_arguments: keyword arguments of the chat template.
      dtype: of activations and matrix products.
      seed: of the samples and the bootstrap.
      allow_weak_sandbox: allow running programs without bubblewrap.
    """

    num_responses: int = 0
    temperature: float = 0.6
    top_p: float = 1.0
    max_tokens: int = 1024
    max_prompt_tokens: int = 0
    overlong_prompts: Literal["error", "drop"] = "error"
    stop: tuple[str, ...] = ()
    problems: int = 0
    batch: int = 0
    chat: bool | None = None
    template_arguments: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0
    allow_weak_sandbox: bool = False

    @property
    def sampling(self) -> Sampling:
        """The sampling distribution. Raises `UserError` if temperature or top_p are out of range."""
        return Sampling(self.temperature, top_p=self.top_p)


@dataclasses.dataclass(frozen=True)
class PreparedBenchmark:
    """A benchmark whose problems have been read and checked for one model.

    Attributes:
      name: name of the benchmark and of its file of responses.
      num_responses: K.
      batch: prompts sampled together.
      limit: the largest number of prompt tokens.
      task: makes the prompts from the rows.
      rows: the P problems.
      prompts_hash: hash of the token ids of the prompts.
      left_out: number of problems that were excluded because their prompts are too long.
      verifier: the verifier, with its sandbox chosen.
      sandbox: the kind of sandbox; empty if the verifier runs no programs.
    """

    name: str
    num_responses: int
    batch: int
    limit: int
    task: Task
    rows: Sequence[Mapping[str, Json]]
    prompts_hash: str
    left_out: int
    verifier: VerifierSpec
    sandbox: str

    def identity(self) -> dict[str, Json]:
        """JSON values that, with the model and the settings, determine the responses and their verdicts."""
        problems = [{"prompt": self.task.prompt(row), "row": row} for row in self.rows]
        return {
            "k": self.num_responses,
            "batch": self.batch,
            "problems": len(self.rows),
            "left_out": self.left_out,
            "data": content_hash(problems),
            "prompts": self.prompts_hash,
            "code": file_hash(parts[0]) if (parts := split_reference(self.verifier.source)) else "",
            "verifier": {**vars(self.verifier), "options": dict(self.verifier.options)},
        }


def prepare_benchmarks(
    benchmarks: Sequence[Benchmark], settings: Settings, tokenizer: Tokenizer, max_positions: int
) -> list[PreparedBenchmark]:
    """Read the problems of all benchmarks and check prompts and verifiers.

    Args:
      max_positions: the largest number of prompt and response tokens of the model.

    Raises:
      UserError: a task cannot be built, a prompt is too long, or programs must run and no sandbox is available.
    """
    names = [benchmark.name for benchmark in benchmarks]
    for name in names:
        if not _FILE_NAME.fullmatch(name) or names.count(name) > 1:
            raise UserError(
                f"benchmark {name!r}: a name is a file name and must be unique; use letters, digits, - _ ."
            )
    limit = settings.max_prompt_tokens or max(1, max_positions - settings.max_tokens)
    if limit + settings.max_tokens > max_positions:
        raise UserError(
            f"--max-tokens = {settings.max_tokens} plus prompts of up to {limit} tokens (--max-prompt-tokens) exceeds "
            f"the {max_positions} positions of the model"
        )
    chat = {} if settings.chat is None else {"chat": settings.chat}
    return [
        _prepare(benchmark, benchmark.build(**chat), settings, tokenizer, limit) for benchmark in benchmarks
    ]


def _prepare(
    benchmark: Benchmark, task: Task, settings: Settings, tokenizer: Tokenizer, limit: int
) -> PreparedBenchmark:
    rows = task.heldout[: settings.problems or len(task.heldout)]
    drop, options = settings.overlong_prompts == "drop", ("--max-prompt-tokens", "--overlong-prompts")
    rows, left_out, prompts_hash = within_limit(
        task, tokenizer, rows, limit, drop, f"benchmark {benchmark.name}", options
    )
    verifier, sandbox = task.verifier.confined(
        allow_weak=settings.allow_weak_sandbox, timeout=VERIFIER_SECONDS
    )
    K = settings.num_responses or benchmark.k
    batch = min(settings.batch or max(1, DEFAULT_BATCH // K), len(rows))
    return PreparedBenchmark(
        benchmark.name, K, batch, limit, task, rows, prompts_hash, left_out, verifier, sandbox
    )


def run_benchmark(
    benchmark: PreparedBenchmark,
    settings: Settings,
    sampler: Sampler,
    weights: PyTree,
    tokenizer: Tokenizer,
    path: Path,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Json]:
    """Sample the responses that are not in the file yet, and compute the scores of all responses.

    Args:
      weights: from `sampler.prepare`.
      path: the file of responses.
      progress: called with the benchmark's name, the number of finished problems, and P.

    Raises:
      VerifierFailed: the verifier failed on every response.

    Returns:
      The dict of `score_responses`, and `left_out` (problems with too long prompts), `skipped` (problems with unusable
      gold answers) and, if the verifier runs programs, the kind of `sandbox`.
    """
    K, P = benchmark.num_responses, len(benchmark.rows)
    with ResponseFile(path, P, K, benchmark.batch) as responses:
        if responses.problems < P:
            with VerifierPool(
                benchmark.verifier, timeout=VERIFIER_SECONDS, allow_weak_sandbox=settings.allow_weak_sandbox
            ) as pool:
                collect = Collector(benchmark.task, tokenizer, sampler, pool, benchmark.limit)
                request = SampleRequest(
                    K, settings.max_tokens, settings.sampling, settings.stop, settings.seed
                )
                where = {"prompts_per_batch": benchmark.batch, "start": responses.problems}
                batches = sample_rows(collect, weights, benchmark.rows, request, **where)
                progress(benchmark.name, responses.problems, P)
                for batch in batches:
                    responses.append(batch.records())
                    progress(benchmark.name, responses.problems, P)
                    if responses.problems >= min(P, ENOUGH_PROBLEMS):
                        _require_judged(responses, benchmark.name)
        _require_judged(responses, benchmark.name)
        found = _failures(responses)
        result = score_responses(responses.summaries, K, settings.seed)
    sandbox = {"sandbox": benchmark.sandbox} if benchmark.sandbox else {}
    skipped = benchmark.task.about.get("heldout", {}).get("skipped", 0)
    if message := warning(found, f"benchmark {benchmark.name}"):
        print(f"lpo: {message}", file=sys.stderr)
    return {**result, "left_out": benchmark.left_out, "skipped": skipped, **sandbox}


def _failures(responses: ResponseFile) -> Failures:
    reasons = (summary.reason or "" for summary in responses.summaries if summary.outcome == "infrastructure")
    return Failures(len(responses.summaries), dict(Counter(reasons)))


def _require_judged(responses: ResponseFile, name: str) -> None:
    """Raise `VerifierFailed` if all responses so far are masked, and remove them, so that a resume samples again."""
    try:
        require_judged(_failures(responses), f"benchmark {name}")
    except VerifierFailed:
        responses.clear()
        raise


def score_responses(
    summaries: Sequence[ResponseSummary], num_responses: int, seed: int = 0
) -> dict[str, Json]:
    """Compute the scores of one benchmark.

    Args:
      summaries: of P x K responses, ordered by problem.
      num_responses: K.
      seed: of the bootstrap.

    Returns:
      The dict of `metrics.summarise`, with pass@1 as avg@K and pass@k for K and the powers of two below it. In
      addition `"maj@k"` for k = K in the same form (see `votes.majority`; NaN if there are no answers), `truncated` and
      `malformed` (fractions of all responses), `mean_length` (tokens) and `mean_reward` (mean over valid responses).
    """
    K = num_responses
    column = lambda name: np.array([getattr(summary, name) for summary in summaries]).reshape(-1, K)  # noqa: E731
    outcome = column("outcome")
    passed, valid, rewards = outcome == "pass", outcome != "infrastructure", column("reward")
    answers = [[summary.answer for summary in summaries[i : i + K]] for i in range(0, len(summaries), K)]
    return {
        **summarise(passed, valid, ks={*powers_of_two(K), K}, seed=seed),
        f"maj@{K}": with_interval(majority(passed, valid, answers), seed=seed),
        "truncated": float(np.mean(~column("finished"))),
        "malformed": float(np.mean(outcome == "malformed")),
        "mean_length": float(column("tokens").mean()),
        "mean_reward": float(rewards[valid].mean()) if valid.any() else float("nan"),
    }


def mean_pass_at_1(results: Mapping[str, Mapping[str, Json]]) -> float:
    """pass@1 averaged over the benchmarks, as in the LPO paper's curves."""
    return float(np.mean([result["pass@1"]["mean"] for result in results.values()]))
