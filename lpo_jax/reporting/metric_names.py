"""The table of all metrics that a run can write: name, unit and meaning.

Metrics that verl also has use verl's names, so that its dashboards can read our runs. Metrics that verl does not have
are under `lpo/`, `reward/` and `val-aux/`. `RunWriter` rejects names that are not in the table, so the table and
`docs/metrics.md`, which `metrics_markdown` renders from it, are always complete.

In a name, `{a,b}` stands for each of the words, `<data>` and `<name>` for the name of a data set or of a value (it may
contain slashes), and `<n>` and `<k>` for integers.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lpo_jax.errors import nearest
from lpo_jax.types import Json


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        name: the name, with words in braces and placeholders as described in the module's docstring.
        unit: the unit of the value.
        meaning: description of the value.
        timing: whether the value depends on the machine and the process. Two runs with the same seed agree on all
            other metrics.
    """

    name: str
    unit: str
    meaning: str
    timing: bool = False


def _timing(name: str, unit: str, meaning: str) -> Metric:
    return Metric(name, unit, meaning, timing=True)


METRICS: tuple[Metric, ...] = (
    # Rewards. The prefix "critic" is verl's; there is no critic network.
    Metric("critic/score/{mean,max,min}", "reward", "reward from the verifier, over the valid responses"),
    Metric(
        "critic/rewards/{mean,max,min}",
        "reward",
        "reward after the method's shaping, over the responses that belong to their groups",
    ),
    Metric(
        "critic/advantages/{mean,max,min}",
        "-",
        "advantage, over the same responses: for LPO the utility u = (R - b) / tau, whose softmax is the target",
    ),
    Metric(
        "reward/parts/<name>",
        "-",
        "mean of a numeric part of the verdicts, over the valid responses that have it",
    ),
    Metric("reward/pass_rate", "fraction", "valid responses whose outcome is `pass`"),
    Metric(
        "reward/outcome/{pass,wrong,malformed,timeout,infrastructure}",
        "fraction",
        "fraction of all responses with this outcome; `timeout`: verification took too long; `infrastructure`: the"
        " verifier failed, so the response is masked",
    ),
    # Lengths.
    Metric("response_length/{mean,max,min}", "tokens", "length of the responses, including the end token"),
    Metric(
        "response_length/clip_ratio",
        "fraction",
        "responses that reached the length limit without an end token",
    ),
    Metric(
        "response/repetition",
        "fraction",
        "sequences of four tokens that occurred before in the same response, mean over responses",
    ),
    Metric("prompt_length/{mean,max,min}", "tokens", "length of the prompts without padding"),
    Metric("prompt_length/clip_ratio", "fraction", "prompts at the length limit"),
    # The update.
    Metric("actor/pg_loss", "-", "the objective's loss, mean over the updates of the step"),
    Metric(
        "actor/pg_clipfrac",
        "fraction",
        "tokens that the trust region masks, or whose importance weight it clips",
    ),
    Metric(
        "actor/ppo_kl", "nats/token", "mean of behaviour minus current log-prob (the k1 estimate, as in verl)"
    ),
    Metric(
        "actor/kl_loss",
        "nats/token",
        "estimated divergence from the reference model, without its coefficient",
    ),
    Metric("actor/entropy_loss", "nats/token", "minus the entropy, for methods with an entropy bonus"),
    Metric(
        "actor/entropy",
        "nats/token",
        "mean entropy of the distribution that the response tokens were sampled from",
    ),
    Metric("actor/grad_norm", "-", "l2 norm of the gradient before clipping, mean over the step's updates"),
    Metric("actor/lr", "-", "learning rate of the step's last update"),
    # LPO: computed per prompt on the simplex of its responses, then averaged over prompts unless noted otherwise.
    Metric("lpo/target_tv", "fraction", "total variation between the target w* and uniform"),
    Metric("lpo/policy_tv", "fraction", "total variation between the policy P and uniform"),
    Metric("lpo/coef_l1", "-", "sum over a prompt's responses of |coefficient|; 2 TV(P, w*) for lpo-forward"),
    Metric(
        "lpo/coef_sum", "-", "maximum over prompts of |sum of the coefficients|; 0 up to rounding for LPO"
    ),
    Metric(
        "lpo/score_abs_max", "nats", "maximum of |score|, the log-ratio of a response to the behaviour policy"
    ),
    Metric("lpo/temperature_mean", "reward", "mean temperature tau of the target"),
    Metric(
        "lpo/degenerate_group_frac",
        "fraction",
        "prompts whose rewards are all equal, so that they give no signal",
    ),
    Metric(
        "lpo/masked_response_frac",
        "fraction",
        "responses excluded from the simplex (verifier failure or non-finite reward)",
    ),
    Metric("lpo/nonfinite_rewards", "responses", "rewards that are NaN or infinite; they are masked"),
    Metric("lpo/forward_kl", "nats", "KL(w* || P)"),
    Metric("lpo/reverse_kl", "nats", "KL(P || w*)"),
    Metric("lpo/bregman", "-", "GBMPO: Bregman divergence from the reference model, without its coefficient"),
    Metric(
        "lpo/distil_jsd", "nats/token", "Jensen-Shannon divergence from the teacher, for methods with one"
    ),
    Metric(
        "lpo/previous_kl", "nats/token", "MDPO: KL divergence from the behaviour policy, without its weight"
    ),
    Metric(
        "lpo/logp_gap_mean",
        "nats/token",
        "mean |log-prob in the sampler - log-prob in the trainer| with the same weights, over the tokens that the "
        "first update runs, or that are rescored (all with training.pull_back = all; not with sampling.ahead)",
    ),
    Metric("lpo/logp_gap_max", "nats", "maximum of this gap over the same tokens"),
    Metric(
        "lpo/staleness_{mean,max}",
        "steps",
        "sampling.ahead: age of the behaviour policy when the step learns from its token, over the tokens of the step",
    ),
    Metric(
        "lpo/stale_token_fraction",
        "fraction",
        "sampling.ahead: tokens whose behaviour policy is that of an earlier step",
    ),
    Metric("lpo/sampling_rounds", "rounds", "dynamic sampling: number of sampling rounds in the step"),
    Metric("lpo/useful_group_frac", "fraction", "dynamic sampling: groups of the batch with a signal"),
    Metric(
        "lpo/hinted_groups", "groups", "groups without a passing response that had one after a hint was added"
    ),
    Metric("lpo/replay_weight", "-", "PIPO: weight of the update on the previous batch"),
    Metric(
        "lpo/skipped_updates",
        "updates",
        "updates of the step that were skipped because the gradient was not finite",
    ),
    Metric("objective/<name>", "-", "a metric of an objective that is not part of this package"),
    Metric("hook/<name>", "-", "a metric of a hook that is not part of this package"),
    # The run.
    Metric("training/global_step", "steps", "training steps done"),
    Metric("training/epoch", "epochs", "complete passes over the training data"),
    Metric(
        "training/rollout_probs_diff_{mean,max}",
        "probability",
        "|probability in the sampler - probability in the trainer|",
    ),
    Metric(
        "perf/signal_fraction",
        "fraction",
        "tokens of the updates' batches whose gradient was computed; the others have coefficients of 0",
    ),
    Metric("perf/total_num_tokens", "tokens", "prompt and response tokens of the step without padding"),
    _timing("perf/time_per_step", "s", "wall time of the step"),
    _timing("perf/throughput", "tokens/s", "perf/total_num_tokens per second and device"),
    _timing("perf/cpu_memory_used_gb", "GB", "peak host memory of the main process"),
    _timing("perf/max_memory_allocated_gb", "GB", "peak device memory so far, if the device reports it"),
    _timing("perf/compiles", "programs", "programs compiled so far in this process"),
    _timing(
        "perf/useful_row_steps",
        "fraction",
        "fraction of the sampler's row steps that drew a token",
    ),
    _timing("timing_s/gen", "s", "sampling the responses, which includes verifying those that finish early"),
    _timing("timing_s/reward", "s", "verifying the responses, without the part that overlaps with sampling"),
    _timing(
        "timing_s/old_log_prob",
        "s",
        "recomputing the log-probs of the responses with the behaviour policy's weights",
    ),
    _timing("timing_s/update_actor", "s", "gradients and parameter updates"),
    _timing("timing_s/testing", "s", "held-out evaluation"),
    _timing(
        "timing_s/save_checkpoint", "s", "saving a checkpoint, without the part that runs in the background"
    ),
    _timing("timing_s/step", "s", "the whole step"),
    # Held-out evaluation.
    Metric(
        "val-core/<data>/score/mean@<n>",
        "-",
        "what `evaluation.score` names, mean over problems: the pass rate, the reward, or a part of the verdicts. The"
        " best checkpoint and the run doctor follow it",
    ),
    Metric("val-aux/<data>/score/{ci_low,ci_high}", "-", "its 95% bootstrap interval over problems"),
    Metric(
        "val-core/<data>/acc/mean@<n>", "fraction", "fraction of <n> samples that pass, mean over problems"
    ),
    Metric(
        "val-core/<data>/acc/pass@<k>",
        "fraction",
        "probability that at least one of <k> samples passes, unbiased (Chen et al. 2021). verl's `best@<k>`"
        " draws with replacement and is therefore lower",
    ),
    Metric(
        "val-aux/<data>/acc/pass@<k>/{ci_low,ci_high}",
        "fraction",
        "95% bootstrap interval of pass@<k> over problems",
    ),
    Metric("val-aux/<data>/acc/pass@<k>/problems", "problems", "problems with at least <k> valid samples"),
    Metric("val-aux/<data>/reward/mean@<n>", "reward", "mean reward of the samples"),
    Metric("val-aux/<data>/response_length/mean", "tokens", "mean length of the evaluation's responses"),
    Metric(
        "val-aux/<data>/response_length/clip_ratio",
        "fraction",
        "responses of the evaluation that reached the length limit",
    ),
    Metric(
        "val-aux/<data>/invalid_samples", "samples", "samples excluded because the verifier failed on them"
    ),
    # The search for a mirror map (`lpo meta`), one row per round.
    Metric("meta/fitness/{mean,max,min}", "fraction", "final held-out pass@1 of the round's candidates"),
    Metric("meta/best", "fraction", "mean fitness of the best round so far"),
    Metric("meta/accepted", "fraction", "1 if the round is the best so far, so that the map was updated"),
    Metric("meta/sigma", "-", "standard deviation of the candidates' noise"),
    Metric("meta/step_norm", "-", "l2 norm of the map's update"),
    # Supervised warm start (`lpo sft`), with the names of verl's SFT trainer.
    Metric("train/loss", "nats/token", "supervised loss: mean negative log-prob of the target tokens"),
    Metric("train/grad_norm", "-", "l2 norm of the gradient before clipping"),
    Metric("train/lr", "-", "learning rate of the step"),
    Metric("train/global_tokens", "tokens", "target tokens of the step"),
)

_SCORE, _PASS_AT_1 = re.compile(r"val-core/(.+)/score/mean@\d+"), re.compile(r"val-core/(.+)/acc/pass@1")
_PLACEHOLDERS = {"<data>": r".+", "<name>": r".+", "<n>": r"\d+", "<k>": r"\d+"}


def _pattern(name: str) -> re.Pattern:
    parts = re.split(r"(\{[^}]*\}|<[^>]*>)", name)
    regex = ""
    for part in parts:
        if part.startswith("{"):
            regex += "(?:" + "|".join(re.escape(word) for word in part[1:-1].split(",")) + ")"
        else:
            regex += _PLACEHOLDERS.get(part) or re.escape(part)
    return re.compile(regex)


_PATTERNS = tuple((_pattern(metric.name), metric) for metric in METRICS)


@functools.lru_cache(maxsize=4096)
def find_metric(name: str) -> Metric | None:
    """Return the row of the table that matches a name without placeholders, or None."""
    return next((metric for pattern, metric in _PATTERNS if pattern.fullmatch(name)), None)


def check(names: Iterable[str]) -> None:
    """Check that all names are in the table.

    Raises:
        ValueError: a name is unknown; the message suggests the closest known name.
    """
    for name in names:
        if find_metric(name) is None:
            hint = nearest(name, [metric.name for metric in METRICS])
            raise ValueError(f"unknown metric {name!r}{hint}; add it to lpo_jax/reporting/metric_names.py")


def is_timing(name: str) -> bool:
    """Return whether a metric depends on the machine and the process, so that repeated runs may differ in it."""
    metric = find_metric(name)
    return metric is not None and metric.timing


def validation_metrics(data: str, summary: Mapping) -> dict[str, float]:
    """Return the metrics of a held-out evaluation under their `val-core/...` and `val-aux/...` names.

    Args:
        data: name of the data set.
        summary: of `lpo_jax.evaluation.heldout.Evaluation`.
    """
    metrics = {}
    for k in summary["ks"]:
        interval = summary[f"pass@{k}"]
        metrics[f"val-core/{data}/acc/pass@{k}"] = interval["mean"]
        for part in ("ci_low", "ci_high", "problems"):
            metrics[f"val-aux/{data}/acc/pass@{k}/{part}"] = interval[part]
    metrics[f"val-core/{data}/acc/mean@{summary['samples_per_problem']}"] = summary["mean"]
    metrics[f"val-aux/{data}/invalid_samples"] = summary["invalid_samples"]
    metrics[f"val-core/{data}/score/mean@{summary['samples_per_problem']}"] = summary["score"]["mean"]
    for part in ("ci_low", "ci_high"):
        metrics[f"val-aux/{data}/score/{part}"] = summary["score"][part]
    return metrics


def heldout_score(row: Mapping[str, Json]) -> tuple[float, float, float] | None:
    """Return the held-out score of a row of metrics with the bounds of its interval; None for a row without one.

    In runs of older versions it is pass@1.
    """
    for pattern, interval in ((_SCORE, "score"), (_PASS_AT_1, "acc/pass@1")):
        for name, value in row.items():
            if value is not None and (found := pattern.fullmatch(name)):
                low, high = (row.get(f"val-aux/{found[1]}/{interval}/{end}") for end in ("ci_low", "ci_high"))
                return value, value if low is None else low, value if high is None else high
    return None


def metrics_markdown() -> str:
    """Render the table as Markdown, one section per prefix: the content of `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "All metrics that a run can write to `metrics.jsonl` and TensorBoard. `{a,b}` stands for each of the words,",
        "`<data>` for the name of a data set, `<name>` for the name of a value, `<n>` and `<k>` for integers. Metrics",
        "marked † depend on the machine and the process. Two runs with the same seed on the same kind of machine agree",
        'on all others. A non-finite value is `null` in `metrics.jsonl`; the `"nonfinite"` entry of its row contains',
        "the value as text.",
    ]
    section = None
    for metric in METRICS:
        first = metric.name.split("/")[0]
        if first != section:
            section = first
            lines += ["", f"## {section}", "", "| name | unit | meaning |", "|---|---|---|"]
        mark = " †" if metric.timing else ""
        meaning = metric.meaning.replace("<", "&lt;").replace("|", "\\|")
        lines.append(f"| `{metric.name}`{mark} | {metric.unit} | {meaning} |")
    return "\n".join(lines) + "\n"
