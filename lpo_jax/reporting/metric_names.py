"""Every metric that a run can write, in one table: its name, its unit and what it means.

Names that verl has are verl's, so that its dashboards read our runs; what is ours alone is under `lpo/`,
`reward/` and `val-aux/`. The writers refuse a name that is not here, so the table, and the documentation
made from it by `metrics_markdown`, cannot fall behind the program.

In a name `{a,b}` stands for each of its words, `<data>` for the name of a data set (it may hold slashes)
and `<n>`, `<k>` for whole numbers.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lpo_jax.errors import nearest


@dataclass(frozen=True)
class Metric:
    """One row of the table. `timing` marks what depends on the machine and the process and not on the
    mathematics: two runs from one seed agree on everything else."""

    name: str
    unit: str
    meaning: str
    timing: bool = False


def _timing(name: str, unit: str, meaning: str) -> Metric:
    return Metric(name, unit, meaning, timing=True)


METRICS: tuple[Metric, ...] = (
    # Rewards. "critic" is verl's word; there is no critic network here.
    Metric("critic/score/{mean,max,min}", "reward", "what the verifier gave, over the responses that count"),
    Metric("critic/rewards/{mean,max,min}", "reward", "what the objective is given: the score after shaping"),
    Metric("reward/pass_rate", "fraction", "responses whose outcome is `pass`, of those that count"),
    Metric(
        "reward/outcome/{pass,wrong,malformed,timeout,infrastructure}",
        "fraction",
        "share of each outcome among all responses; `timeout`: verifying took too long; `infrastructure`: the"
        " verifier failed, not the response",
    ),
    # Lengths.
    Metric("response_length/{mean,max,min}", "tokens", "length of the responses, the end token included"),
    Metric(
        "response_length/clip_ratio", "fraction", "responses that hit the length limit before an end token"
    ),
    Metric("prompt_length/{mean,max,min}", "tokens", "length of the prompts, padding not counted"),
    Metric("prompt_length/clip_ratio", "fraction", "prompts at the length limit"),
    # The update.
    Metric("actor/pg_loss", "-", "the objective's loss, mean over the updates of the step"),
    Metric(
        "actor/pg_clipfrac",
        "fraction",
        "tokens that the trust region shuts, or whose importance weight it clips",
    ),
    Metric("actor/ppo_kl", "nats/token", "mean of behaviour minus current log-prob (verl's k1 estimate)"),
    Metric(
        "actor/kl_loss", "nats/token", "estimated divergence from the reference model, before its coefficient"
    ),
    Metric("actor/entropy_loss", "nats/token", "minus the entropy, where a method has a bonus for it"),
    Metric("actor/entropy", "nats/token", "mean entropy of the next-token distribution on response tokens"),
    Metric("actor/grad_norm", "-", "l2 norm of the gradient before clipping, mean over the step's updates"),
    Metric("actor/lr", "-", "learning rate of the step's last update"),
    # LPO: per prompt on the simplex of its responses, then the mean over prompts unless it says otherwise.
    Metric("lpo/target_tv", "fraction", "total variation between target and uniform: how far rewards pull"),
    Metric("lpo/policy_tv", "fraction", "total variation between policy and uniform: how far it has moved"),
    Metric("lpo/coef_l1", "-", "sum over a prompt's responses of |coefficient|; 2 TV(P, w*) for lpo-forward"),
    Metric(
        "lpo/coef_sum", "-", "largest |sum of a prompt's coefficients| of the step; 0 to rounding for LPO"
    ),
    Metric("lpo/score_abs_max", "nats", "largest |score|: log-ratio of a response to the behaviour policy"),
    Metric("lpo/temperature_mean", "reward", "mean temperature tau of the target"),
    Metric("lpo/degenerate_group_frac", "fraction", "prompts whose rewards are all equal: no signal in them"),
    Metric(
        "lpo/masked_response_frac",
        "fraction",
        "responses left out of the simplex (verifier failure or non-finite reward)",
    ),
    Metric("lpo/nonfinite_rewards", "responses", "rewards that were NaN or infinite; they are masked"),
    Metric("lpo/forward_kl", "nats", "KL(w* || P)"),
    Metric("lpo/reverse_kl", "nats", "KL(P || w*)"),
    Metric("lpo/bregman", "-", "GBMPO: Bregman divergence from the reference model, before its coefficient"),
    Metric("lpo/distil_jsd", "nats/token", "Jensen-Shannon divergence from the teacher, where there is one"),
    Metric("lpo/previous_kl", "nats/token", "MDPO: KL from the policy that sampled, before its weight"),
    Metric("lpo/logp_gap_mean", "nats/token", "mean |log-prob when sampled - when scored|, same weights"),
    Metric("lpo/logp_gap_max", "nats", "largest such gap of one token in the step"),
    Metric("lpo/sampling_rounds", "rounds", "dynamic sampling: rounds of sampling this step took"),
    Metric("lpo/useful_group_frac", "fraction", "dynamic sampling: groups of the batch that carry a signal"),
    Metric("lpo/hinted_groups", "groups", "groups that all failed and passed with a hint"),
    Metric("lpo/replay_weight", "-", "PIPO: weight of the update on the batch before"),
    Metric("lpo/skipped_updates", "updates", "updates of this step not applied: gradient not finite"),
    # The run.
    Metric("training/global_step", "steps", "training steps done"),
    Metric("training/epoch", "epochs", "passes over the training data, whole ones"),
    Metric("training/rollout_probs_diff_{mean,max}", "probability", "|probability when sampled - scored|"),
    Metric("perf/total_num_tokens", "tokens", "prompt and response tokens of the step, padding not counted"),
    _timing("perf/time_per_step", "s", "wall time of the step"),
    _timing("perf/throughput", "tokens/s", "total_num_tokens per second and device"),
    _timing("perf/cpu_memory_used_gb", "GB", "memory of the main process on the host"),
    _timing("perf/max_memory_allocated_gb", "GB", "most memory in use on a device so far, where it tells"),
    _timing("perf/compiles", "programs", "programs compiled so far in this process"),
    _timing(
        "perf/useful_row_steps",
        "fraction",
        "of the steps that the sampler ran: those that drew a token",
    ),
    _timing("timing_s/gen", "s", "sampling the responses, and verifying those that end before the last"),
    _timing("timing_s/reward", "s", "verifying the responses, as far as sampling does not hide it"),
    _timing("timing_s/old_log_prob", "s", "scoring the responses with the weights that sampled them"),
    _timing("timing_s/update_actor", "s", "gradients and updates of the weights"),
    _timing("timing_s/testing", "s", "held-out evaluation"),
    _timing("timing_s/save_checkpoint", "s", "saving a checkpoint, as far as the step waits for it"),
    _timing("timing_s/step", "s", "the whole step"),
    # Held-out evaluation.
    Metric("val-core/<data>/acc/mean@<n>", "fraction", "share of <n> samples that pass, mean over problems"),
    Metric(
        "val-core/<data>/acc/pass@<k>",
        "fraction",
        "chance that one of <k> samples passes, unbiased (Chen et al. 2021). Not verl's `best@<k>`, which"
        " draws with replacement and so reports less",
    ),
    Metric(
        "val-aux/<data>/acc/pass@<k>/{ci_low,ci_high}",
        "fraction",
        "95% bootstrap interval of pass@<k> over problems",
    ),
    Metric("val-aux/<data>/acc/pass@<k>/problems", "problems", "problems with at least <k> valid samples"),
    Metric("val-aux/<data>/reward/mean@<n>", "reward", "mean reward of the samples"),
    Metric("val-aux/<data>/response_length/mean", "tokens", "mean length of the evaluation's responses"),
    Metric("val-aux/<data>/response_length/clip_ratio", "fraction", "of those, cut off at the length limit"),
    Metric("val-aux/<data>/invalid_samples", "samples", "samples not counted: the verifier failed on them"),
    # The search for a mirror map (`lpo meta`), a row a round.
    Metric("meta/fitness/{mean,max,min}", "fraction", "final held-out pass@1 of the round's candidates"),
    Metric("meta/best", "fraction", "mean of the best round so far"),
    Metric("meta/accepted", "fraction", "1 where the round was the best so far, and the map moved"),
    Metric("meta/sigma", "-", "standard deviation of the candidates' noise"),
    Metric("meta/step_norm", "-", "l2 norm of the map's move"),
    # Supervised warm start (`lpo sft`), under the names of verl's SFT trainer.
    Metric("train/loss", "nats/token", "supervised loss: mean negative log-prob of the target tokens"),
    Metric("train/grad_norm", "-", "l2 norm of the gradient before clipping"),
    Metric("train/lr", "-", "learning rate of the step"),
    Metric("train/global_tokens", "tokens", "target tokens of the step"),
)

_PLACEHOLDERS = {"<data>": r".+", "<n>": r"\d+", "<k>": r"\d+"}


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
    """The table's row for a concrete name, or None."""
    return next((metric for pattern, metric in _PATTERNS if pattern.fullmatch(name)), None)


def check(names: Iterable[str]) -> None:
    """Refuses names that the table does not hold.

    Raises:
        ValueError: names the first unknown one and the nearest known one.
    """
    for name in names:
        if find_metric(name) is None:
            hint = nearest(name, [metric.name for metric in METRICS])
            raise ValueError(f"unknown metric {name!r}{hint}; add it to lpo_jax/reporting/metric_names.py")


def is_timing(name: str) -> bool:
    """Whether a metric depends on the machine and the process, so that a repeated run may differ in it."""
    metric = find_metric(name)
    return metric is not None and metric.timing


def validation_metrics(data: str, summary: Mapping) -> dict[str, float]:
    """A held-out evaluation as metrics under their `val-core/...` and `val-aux/...` names.

    Args:
        data: name of the data set.
        summary: what `lpo_jax.evaluation.metrics.summarise` returns.
    """
    metrics = {}
    for k in summary["ks"]:
        interval = summary[f"pass@{k}"]
        metrics[f"val-core/{data}/acc/pass@{k}"] = interval["mean"]
        for part in ("ci_low", "ci_high", "problems"):
            metrics[f"val-aux/{data}/acc/pass@{k}/{part}"] = interval[part]
    metrics[f"val-core/{data}/acc/mean@{summary['samples_per_problem']}"] = summary["mean"]
    metrics[f"val-aux/{data}/invalid_samples"] = summary["invalid_samples"]
    return metrics


def metrics_markdown() -> str:
    """The table as Markdown, one section for each first part of a name: the text of `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Every name that a run can write to `metrics.jsonl` and TensorBoard. `{a,b}` stands for each of",
        "its words, `<data>` for a data set, `<n>` and `<k>` for numbers. Those marked † depend on the",
        "machine and the process; on all others two runs from one seed on one kind of machine agree.",
        'A value that is not finite is `null` in `metrics.jsonl`; `"nonfinite"` in its row says what it was.',
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
