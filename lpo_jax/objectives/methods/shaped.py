"""Policy gradients that differ in their advantage: baselines, scales, prompt weights, shaped rewards."""

from typing import Any

from lpo_jax.objectives import shaping
from lpo_jax.objectives.advantage import Advantage, NonzeroAdvantage, Utility
from lpo_jax.objectives.hook_specs import GreedyBaseline, Judge
from lpo_jax.objectives.methods.row import Method, method
from lpo_jax.objectives.probe import Probe, ProbeAdvantage
from lpo_jax.objectives.projection import Simplex
from lpo_jax.objectives.regular import KL
from lpo_jax.objectives.risk import Quantiles, RiskAdvantage
from lpo_jax.objectives.trust import Gate, LogClip, RatioClip
from lpo_jax.objectives.weights import Aggregate, Difficulty, LongerSuccess, SignalShare


def _gradient(name: str, formula: str, paper: str, fidelity: str, note: str = "", **parts: Any) -> Method:
    # The KL to a reference is off by default, as in most papers since DAPO; a config can switch it on.
    return method(name, formula, paper, fidelity, note, regular=(KL(),), **parts)


METHODS = (
    _gradient("grpo", "c = -A / K, A = (R - mu) / sigma; PPO clip", "DeepSeekMath, arXiv 2402.03300", "code"),
    _gradient(
        "dr-grpo",
        "c = -A / K, A = R - mu; PPO clip; token sum / max_tokens",
        "Understanding R1-Zero-Like Training, arXiv 2503.20783",
        "code",
        advantage=Advantage(temperature="dr-grpo"),
        aggregate=Aggregate("seq-mean-token-sum-norm"),
    ),
    _gradient(
        "maxrl",
        "c = -A / K, A = (R - mu) / mu; PPO clip",
        "Maximum Likelihood Reinforcement Learning (Tajwar et al., 2026)",
        "code",
        advantage=Advantage(temperature="maxrl"),
    ),
    _gradient(
        "rloo",
        "c = -A / K, A = R - mean of the others = K / (K - 1) (R - mu); no ratio, no clip",
        "Back to Basics (REINFORCE leave-one-out), arXiv 2402.14740",
        "code",
        "the paper's log-prob of a response is the sum over its tokens: aggregation 'seq-mean-token-sum'",
        advantage=Advantage(temperature="dr-grpo", centre="loo"),
        gate=Gate(),
    ),
    _gradient(
        "remax",
        "c = -A / K, A = R - R of a greedy response; no ratio, no clip",
        "ReMax, arXiv 2310.10505",
        "code",
        advantage=Advantage(temperature="dr-grpo", centre="baseline"),
        gate=Gate(),
        hooks=(GreedyBaseline(),),
        min_group_size=1,
    ),
    _gradient(
        "opo",
        "c = -A / K, A = R - sum T R / sum T; no ratio, no clip; token mean",
        "On-Policy RL with Optimal Reward Baseline, arXiv 2505.23585",
        "code",
        "designed for one update per round",
        advantage=Advantage(temperature="dr-grpo", centre="length"),
        gate=Gate(),
        aggregate=Aggregate("token-mean"),
    ),
    _gradient(
        "reinforce++-baseline",
        "c = -A / K, A = (R - mu) / (deviation of R - mu over the batch); PPO clip",
        "REINFORCE++, arXiv 2501.03262",
        "code",
        "public code takes mean and deviation over tokens, so that long responses weigh more in them",
        advantage=Advantage(temperature="batch"),
    ),
    _gradient(
        "gpg",
        "c = -lambda (R - mu) / K, lambda = groups / groups whose rewards differ; no ratio, no clip; token mean",
        "Group Policy Gradient, arXiv 2504.02546",
        "code",
        "verl's lambda counts responses, and those with reward 0 as without signal",
        advantage=Advantage(temperature="dr-grpo"),
        prompt_weight=SignalShare(),
        gate=Gate(),
        aggregate=Aggregate("token-mean"),
    ),
    _gradient(
        "grpo-passk",
        "c = -A / K, A = (R_best - R_second) / sigma for the best response, 0 for the others; PPO clip",
        "Pass@k optimisation as in verl's grpo_passk",
        "code",
        advantage=Advantage(centre="runner-up"),
    ),
    _gradient(
        "mc-grpo",
        "c = -A / K, A = (R - median) / (MAD + 0.001) x (K + 1) / (responses with A != 0); one at the median left out",
        "MC-GRPO (median-centred), public code lotusroot-kim/MC-GRPO",
        "code",
        "sample an odd number; where the MAD is 0 (most binary groups), the mean deviation is used",
        advantage=NonzeroAdvantage(temperature="mad", centre="median"),
        select=shaping.DropMedian(),
    ),
    _gradient(
        "bnpo",
        "c = -A / K, A = (R - mu) / Beta density at mu, fitted to the batch; PPO clip 0.2, 0.28; token sum",
        "Beta Normalization Policy Optimization, arXiv 2506.02864",
        "code",
        "one verifiable reward in [0, 1], so without the paper's split into several rewards",
        advantage=Advantage(temperature="beta"),
        gate=RatioClip(epsilon_high=0.28),
        aggregate=Aggregate("seq-mean-token-sum"),
    ),
    _gradient(
        "dgpo",
        "c = -lambda A / K, A = (R - mu) / mean abs(R - mu), lambda = N softmax(-p / 2) over groups with signal",
        "MathForge, public code AMAP-ML/MathForge",
        "code",
        "groups of equal rewards are left out, as by the code's length rebalancing; no rewritten questions",
        advantage=Advantage(temperature="mean-abs"),
        prompt_weight=Difficulty(),
        aggregate=Aggregate("token-mean"),
        degenerate="mask",
    ),
    method(
        "lpo-dgpo",
        "c = P - w*, w* = softmax(lambda R / tau + s_t), tau = mean abs(R - mu), lambda as in dgpo",
        "the target that DGPO implies, LPO, arXiv 2605.06139, table 1",
        "derived",
        "under LPO a prompt's weight may sharpen its target or multiply its loss: prompt_weight_inside",
        advantage=Utility(temperature="mean-abs"),
        prompt_weight=Difficulty(),
        prompt_weight_inside=True,
        projection=Simplex(),
        gate=LogClip(),
        aggregate=None,
    ),
    _gradient(
        "adora",
        "c = -lambda A / K, A as in grpo, lambda = 0.1 unless the longest pass is longer than the mean failure",
        "ADORA, public code ShadeCloak/ADORA",
        "code",
        prompt_weight=LongerSuccess(),
    ),
    _gradient(
        "riskpo",
        "c = -A / K, A = (1.5 CVaR + RVaR) / 2.5 of the summed rewards of 5 prompts / deviations; PPO clip",
        "RiskPO, public code RTkenny/RiskPO",
        "code",
        "bundles with equal scores are not scaled (the code divides by 1e-6); minibatches should hold whole bundles",
        advantage=RiskAdvantage(),
        control=Quantiles(),
        min_group_size=1,
    ),
    _gradient(
        "poise",
        "c = -A / K, A = R - mean over the other responses of a linear probe on their states; PPO clip",
        "POISE, arXiv 2605.07579",
        "paper",
        "designed for K = 2; the probe's penalty and width are ours",
        advantage=ProbeAdvantage(),
        control=Probe(),
    ),
    _gradient(
        "progrpo",
        "c = -A / K, A = (R - mu) / sigma + a (confidence in the prompt - in the response); PPO clip 0.2, 0.28",
        "ProGRPO, arXiv 2602.05281",
        "note",
        "a was not found: 0.3 is ours",
        bias=shaping.ConfidenceGap(),
        gate=RatioClip(epsilon_high=0.28),
    ),
    _gradient(
        "copo",
        "c = -A / K, A = w(H) (R - mu) / sigma + (1 - w(H)) (mu - mean mu) / deviation of mu, H of the answers",
        "COPO, arXiv 2508.04138",
        "reconstructed",
        "the weight's form and numbers are ours; one clipped loss of the mixed advantage in place of two losses",
        bias=shaping.GlobalMix(),
    ),
    _gradient(
        "empo",
        "c = -A / K, A as in grpo of R = the share of the group with the same answer; PPO clip",
        "EMPO, arXiv 2504.05812",
        "code",
        "the threshold on the answers' entropy is in the code's settings, not in its reward",
        shape=(shaping.ClusterFrequency(),),
    ),
    _gradient(
        "fapo",
        "c = -A / K, A as in grpo of R = +-1, less 1 for a pass with a wrong step, less DAPO's overlong penalty",
        "FAPO, public code verl-recipe/fapo",
        "code",
        "on DAPO's loss, without its dynamic sampling; the judge is the user's function, not a trained reward model",
        shape=(shaping.Sign(), shaping.FlawPenalty(), shaping.Overlong()),
        gate=RatioClip(epsilon_high=0.28, dual_clip=10.0),
        aggregate=Aggregate("token-mean"),
        hooks=(Judge(),),
    ),
    _gradient(
        "ssl-tiers",
        "c = -A / K, A as in grpo of R = pass + weight x steps of the reward; PPO clip",
        "SSL (Sweet Spot Learning for agentic optimization, 2026)",
        "reconstructed",
        "zones of the reward itself; the paper's are of each task's own distances",
        shape=(shaping.RewardTiers(),),
    ),
)
