"""Listwise methods: projections onto a target on the response simplex, and losses on the scores of a group."""

from typing import Any

from lpo_jax.objectives.advantage import DualUtility, Utility
from lpo_jax.objectives.flow import FlowBalance, LogPartition, Scaled
from lpo_jax.objectives.methods.row import method
from lpo_jax.objectives.projection import Projection, RawSimplex, ReferenceSimplex, Simplex
from lpo_jax.objectives.ranking import Difference, Preferences, RankingAdvantage, RewardLabels, SamplerKL
from lpo_jax.objectives.shaping import PerplexityMask
from lpo_jax.objectives.trust import Gate, LogClip

LPO_PAPER = "Listwise Policy Optimization, arXiv 2605.06139"


def _lpo(divergence: str) -> dict[str, Any]:
    # Which of score mean or sum, clip hard, ppo or joint, and ddof 0 or 1 the paper used is UNCERTAIN: see
    # `sequence_scores`, `LogClip` and `temperature`. The defaults follow its text.
    return {
        "advantage": Utility(),
        "projection": Simplex(divergence=divergence),
        "gate": LogClip(),
        "aggregate": None,
    }


def _scores(projection: Projection, **parts: Any) -> dict[str, Any]:
    """A loss on the scores without a trust region; its derivative gives the token weights."""
    return {"projection": projection, "gate": Gate(), "aggregate": None} | parts


METHODS = (
    method(
        "lpo-forward",
        "c = P - w*, w* = softmax(R / tau + s_t)",
        f"{LPO_PAPER}, eq. 10",
        "paper",
        **_lpo("forward-kl"),
    ),
    method(
        "lpo-reverse",
        "c = P (d - sum P d), d = s - R / tau - s_t",
        f"{LPO_PAPER}, eq. 11",
        "paper",
        **_lpo("reverse-kl"),
    ),
    method(
        "lpo-forward-onpolicy",
        "c = 1/K - w* (policy gradient with A = K w* - 1)",
        f"control for {LPO_PAPER}",
        "derived",
        **_lpo("forward-onpolicy"),
    ),
    method(
        "lpo-pointwise",
        "c = -w* (weighted regression: MPO, AWR)",
        f"{LPO_PAPER}, sec. 5.4.1",
        "paper",
        **_lpo("pointwise"),
    ),
    method(
        "mpo",
        "c = -w*, sum scores, eta from the dual: mean KL(w* || uniform) = epsilon; no clip",
        "Maximum a Posteriori Policy Optimisation, arXiv 1806.06920",
        "derived",
        "E-step on the sampled responses; no KL trust region in the M-step. With a constant eta, it is AWR with"
        " weights normalised over the group: lpo-pointwise with score='sum', clip='none', temperature=eta",
        **_scores(Simplex(score="sum", divergence="pointwise"), advantage=DualUtility()),
    ),
    method(
        "tpo",
        "c = P - w*, P = softmax(sum log pi), w* = softmax((R - mu) / sigma + log P_t)",
        "Target Policy Optimization, arXiv 2604.06159",
        "code",
        "scores are raw log-probs, so the sampling probability counts twice: as frequency and in P",
        **_scores(RawSimplex(score="sum"), advantage=Utility()),
    ),
    method(
        "gvpo",
        "c = (d - mean d) / K, d = sum log(pi / pi_b) - R / beta",
        "Group Variance Policy Optimization, arXiv 2504.19599",
        "code",
        "temperature is beta; the public loss is beta^2 K / (K - 1) times this one",
        **_scores(Simplex(score="sum", divergence="logit-var"), advantage=Utility(temperature=0.1)),
    ),
    method(
        "copg",
        "c = (d - mean d) / K, d = sum log(pi / pi_ref) - R / beta: all pairs of a group",
        "Contrastive Policy Gradient, arXiv 2406.19185",
        "note",
        "temperature is beta, whose value in the paper was not found; the sum over pairs is beta K^2 times this loss",
        **_scores(ReferenceSimplex(score="sum", divergence="logit-var"), advantage=Utility(temperature=0.1)),
    ),
    method(
        "flowrl",
        "c = w (log Z + mean log(pi / pi_ref) - 15 A) / K, w = min(rho, 10), log Z learnt",
        "FlowRL, arXiv 2509.15207",
        "code",
        "the public loss is twice this one; its log Z is a three-layer network trained with the model, here a linear"
        " probe of the group's mean features",
        **_scores(FlowBalance(), advantage=Utility(), bias=Scaled(), control=LogPartition()),
    ),
    method(
        "trpa",
        "pairs of levels: mean -log sigmoid(beta (s_i - s_j)), s = mean log(pi / pi_ref); + KL to pi_b",
        "Trust Region Preference Approximation, arXiv 2504.04524",
        "code",
        "public code averages pairs over a microbatch, and uses one-level groups only if it has no pair at all",
        **_scores(Preferences(), advantage=Difference(), regular=(SamplerKL(),)),
    ),
    method(
        "real",
        "log(1 + sum_+ exp(-s / tau)) + log(1 + sum_- exp(s / tau)), s = mean log-ratio",
        "Rewards as Labels, arXiv 2602.05630",
        "code",
        **_scores(RewardLabels(), advantage=Difference()),
    ),
    method(
        "capo-calibration",
        "c = -A / K, A_i = +-sum_j sigmoid(-(v_i - v_j) / tau) / tau over the other verdict; PPO clip",
        "Calibration-Aware Policy Optimization, arXiv 2604.12632",
        "note",
        "v is of the behaviour policy; a second temperature, 0.5, is quoted too; its use was not found",
        advantage=Difference(),
        bias=RankingAdvantage(),
        select=PerplexityMask(),
    ),
)
