"""Methods that change the sampling round: choice of prompts and samples, hints, replay, teachers."""

from lpo_jax.objectives import hook_specs
from lpo_jax.objectives.advantage import Advantage
from lpo_jax.objectives.methods.row import method
from lpo_jax.objectives.regular import AdaptiveKL, Distil
from lpo_jax.objectives.shaping import Overlong
from lpo_jax.objectives.trust import RatioClip
from lpo_jax.objectives.weights import Aggregate, HookWeight, Untaught

METHODS = (
    method(
        "dapo",
        "GRPO; clip 0.2 / 0.28, dual clip 10; token mean; overlong penalty; groups without signal are resampled",
        "DAPO, arXiv 2503.14476",
        "code",
        shape=(Overlong(),),
        gate=RatioClip(epsilon_high=0.28, dual_clip=10.0),
        aggregate=Aggregate("token-mean"),
        hooks=(hook_specs.DynamicSampling(),),
    ),
    method(
        "vas",
        "GRPO; half of each batch drawn in proportion to p (1 - p) of the prompts' pass rates p",
        "MMR1, variance-aware sampling (public code LengSicong/MMR1)",
        "code",
        "pass rates are those of the training groups: the released code refreshes them with extra rollouts",
        hooks=(hook_specs.LearnabilitySampling(),),
    ),
    method(
        "fg-expo",
        "GRPO; KL weight beta (tanh(accuracy) + 1) / 2; prompts drawn by exp(-(p - 1/2)^2 / (2 0.35^2))",
        "FG-ExPO",
        "paper",
        regular=(AdaptiveKL(kl_coef=0.02),),
        hooks=(hook_specs.GaussianSampling(),),
    ),
    method(
        "scaf-grpo",
        "GRPO; if every response of a group fails, one is replaced by one that passed with the smallest hint",
        "Scaf-GRPO (public code dvlab-research/Scaf-GRPO)",
        "code",
        "rows carry `hints`, the vaguest first; the variant that trains under the hinted prompt is not built",
        hooks=(hook_specs.LadderHints(),),
    ),
    method(
        "ghpo",
        "GRPO; groups in which every response fails are sampled again with 25%, 50%, 75% of the solution",
        "GHPO (public code hkgc-1/GHPO)",
        "code",
        hooks=(hook_specs.SolutionHints(),),
    ),
    method(
        "pipo",
        "A = K (R - mu) / sum|R - mu|; one more update on the previous batch, weighted by the change of reward",
        "PIPO",
        "note",
        advantage=Advantage(temperature="mean-abs"),
        prompt_weight=HookWeight(),
        hooks=(hook_specs.Replay(),),
    ),
    method(
        "srpo",
        "GRPO; failed responses with a passing sibling learn by JSD from the policy prompted with it instead",
        "SRPO",
        "note",
        "the wording of the re-prompt was not found",
        token_weight=Untaught(),
        regular=(Distil(),),
        hooks=(hook_specs.SiblingTeacher(),),
    ),
)
