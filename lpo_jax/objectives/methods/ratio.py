"""Policy gradients that differ in their trust region, of token ratios or of sequence ratios."""

from typing import Any

from lpo_jax.objectives import sequence_gates, trust
from lpo_jax.objectives.advantage import Advantage
from lpo_jax.objectives.hook_specs import PreviousPolicy
from lpo_jax.objectives.methods.row import Method, method
from lpo_jax.objectives.regular import KL, PreviousKL, RatioVarianceDual
from lpo_jax.objectives.shaping import Sign
from lpo_jax.objectives.weights import Aggregate, NftWeight

FIBER_PAPER = "Fibration Policy Optimization, arXiv 2603.08239"
VERDICT: dict[str, Any] = {"shape": (Sign(),), "advantage": Advantage(temperature="dr-grpo", centre="none")}


def _bounded(name: str, formula: str, paper: str, fidelity: str, note: str = "", **parts: Any) -> Method:
    # The KL to a reference is off by default; a config can switch it on, as in `shaped.py`.
    return method(name, formula, paper, fidelity, note, **{"regular": (KL(),), **parts})


# Unless the formula says otherwise, all of them have GRPO's advantage A = (R - mu) / sigma, and c = -A / K.
METHODS: tuple[Method, ...] = (
    _bounded(
        "gspo",
        "c = -A / K; PPO clip of s = exp(mean delta), 3e-4 below and 4e-4 above",
        "Group Sequence Policy Optimization, arXiv 2507.18071",
        "code",
        gate=sequence_gates.SequenceClip(),
    ),
    _bounded(
        "gmpo",
        "c = -A / K; loss c exp(mean of delta clipped to +-0.4)",
        "Geometric-Mean Policy Optimization, arXiv 2507.20673",
        "code",
        gate=sequence_gates.GeometricClip(),
    ),
    _bounded(
        "cispo",
        "c = -A / K; loss c sg(clip(rho)) log pi; token mean",
        "MiniMax-M1 (CISPO), arXiv 2506.13585",
        "code",
        "the paper's upper bound was not found: 1.28 is DAPO's, TRL's recipe has 5",
        gate=trust.WeightClip(),
        aggregate=Aggregate("token-mean"),
    ),
    _bounded(
        "minpro",
        "c = -A / K; loss c sg(clip(rho_t min_(i<t) rho_i)) log pi; token mean",
        "A Step Back: Prefix Importance Ratio (MinPRO), arXiv 2601.22718",
        "note",
        "the range of the clip was not found: CISPO's is used",
        gate=sequence_gates.PrefixWeightClip(),
        aggregate=Aggregate("token-mean"),
    ),
    _bounded(
        "sapo",
        "c = -A / K; loss c (4 / tau) sigmoid(tau (rho - 1))",
        "Soft Adaptive Policy Optimization, arXiv 2511.20347",
        "code",
        gate=trust.SoftGate(),
    ),
    _bounded(
        "dhpo",
        "c = -A / K; PPO clip of a rho + (1 - a) s, each clipped in its own range",
        "Dynamic Hybrid Policy Optimization, arXiv 2601.05607",
        "note",
        "the ranges (here PPO's and GSPO's), where the minimum is taken and the entropy's normaliser were not found",
        gate=sequence_gates.HybridClip(),
    ),
    _bounded(
        "fiberpo",
        "c = -A / K; loss c exp(clip(m)) exp(clip(delta - m)), m = mean delta",
        FIBER_PAPER,
        "code",
        "ranges from a third party's code, which subtracts the clipped mean; the unclipped one is our reading",
        gate=sequence_gates.FiberClip(),
    ),
    _bounded(
        "apc",
        "c = -A / K; loss c (1 + clip(rho - 1, +-B)), B = what the others leave of n D; token mean",
        FIBER_PAPER,
        "code",
        "from a third party's code, whose budget D has no default; 0.2 is ours",
        gate=sequence_gates.BudgetClip(),
        aggregate=Aggregate("token-mean"),
    ),
    _bounded(
        "r2vpo",
        "c = -A / K; loss c rho + lambda (rho - 1)^2 / K, lambda by dual ascent",
        "Ratio-Variance Regularized Policy Optimization, arXiv 2601.03320",
        "code",
        "the constants of the dual were not found, these are ours; the replay buffer is left out",
        gate=trust.RatioVariance(),
        control=RatioVarianceDual(),
    ),
    _bounded(
        "gbpo",
        "loss |A| |rho - r*| / K, r* = 1 - e + 2 e sigmoid((A - median A) / lambda); token mean",
        "Bounded Ratio Reinforcement Learning (BPO), arXiv 2604.18578",
        "code",
        "constants of its runs on language models; the code's own default of lambda is 1, and its sigma has ddof 1",
        gate=trust.TargetRatio(),
        aggregate=Aggregate("token-mean"),
    ),
    _bounded(
        "nft",
        "pass: c = -q / K, loss c log rho; fail: c = q / K, loss -c log max(1, (1 - p rho) / (1 - p)); q = 1 - p",
        "Negative-aware Fine-Tuning, arXiv 2505.18116",
        "code",
        "token ratios, as in the code's runs; the code sums over the responses of a minibatch, this takes their mean",
        **VERDICT,
        prompt_weight=NftWeight(),
        gate=trust.ImplicitNegative(),
        aggregate=Aggregate("seq-mean-token-sum-norm", max_tokens=1000),
        degenerate="mask",
    ),
    _bounded(
        "topr",
        "pass: c = -1 / K, loss c log pi; fail: c = 1 / K, loss c sg(min(1, rho_k)) log pi; token sum",
        "Tapered Off-Policy REINFORCE, arXiv 2503.14286",
        "note",
        **VERDICT,
        gate=sequence_gates.TaperedWeight(),
        aggregate=Aggregate("seq-mean-token-sum"),
    ),
    _bounded(
        "etr",
        "c = -A / K; PPO clip of width e (1 + a tanh|A|) (1 + b Var R)",
        "ETR: Elastic Trust Regions, arXiv 2601.03723",
        "reconstructed",
        "from the abstract: the forms and constants of both factors are ours",
        gate=trust.ElasticClip(),
    ),
    _bounded(
        "mdpo",
        "c = -A / K; loss c rho + KL(pi || pi_old) / (K t), t from 1 to 0 over the run",
        "Mirror Descent Policy Optimization, arXiv 2005.09814",
        "note",
        "the KL is over the top-k tokens of pi_old and one bin for the rest; the floor of t is ours",
        gate=trust.Ratio(),
        regular=(PreviousKL(),),
        hooks=(PreviousPolicy(),),
    ),
    _bounded(
        "clip-cov",
        "c = -A / K; PPO clip, and no gradient on a few tokens of covariance 1 to 5; token mean",
        "The Entropy Mechanism of RL, arXiv 2505.22617",
        "code",
        "these tokens are selected by a hash of the log-prob instead of at random",
        gate=trust.ClipCov(),
        aggregate=Aggregate("token-mean"),
    ),
    _bounded(
        "kl-cov",
        "c = -A / K; loss c rho + |delta| / K on the tokens of highest covariance; token mean",
        "The Entropy Mechanism of RL, arXiv 2505.22617",
        "code",
        gate=trust.KLCov(),
        aggregate=Aggregate("token-mean"),
    ),
)
