"""Methods that treat the tokens of a response differently: credit, token weights, and token penalties."""

from lpo_jax.objectives import advantage
from lpo_jax.objectives.entropy_adaptive import EntropyClip, EntropyWeight, TokenLevelUtility
from lpo_jax.objectives.hook_specs import Budgets, PrefixValues, StepJudge
from lpo_jax.objectives.methods.row import Method, method
from lpo_jax.objectives.mirror import Bregman, NeuralMirror, ProbL2
from lpo_jax.objectives.regular import KL, Regular
from lpo_jax.objectives.shaping import MaxVariance
from lpo_jax.objectives.trust import Gate, RatioClip
from lpo_jax.objectives.weights import Aggregate, Conflicts, CurvatureMask, TopEntropy, TopImpact

GBMPO_PAPER = "Group-Based Mirror Policy Optimization, arXiv 2602.04380"


def _gbmpo(name: str, penalty: str, *regular: Regular, note: str = "") -> Method:
    # The paper builds on Dr. GRPO; for GRPO, set temperature "grpo" and aggregation "seq-mean-token-mean".
    return method(
        f"gbmpo-{name}",
        f"Dr. GRPO + {penalty}; q = pi(token), q0 = pi_ref(token)",
        GBMPO_PAPER,
        "code",
        note,
        advantage=advantage.Advantage(temperature="dr-grpo"),
        aggregate=Aggregate("seq-mean-token-sum-norm"),
        regular=regular,
    )


# The public code's default weight of the KL is 0, for which the mixtures would equal the pure penalties.
MIXED = KL(kl_coef=0.01)
MIXED_NOTE = "the weight of the KL is that of a recipe of the public code, whose own default is 0"

METHODS = (
    method(
        "hapo",
        "c = -A / K over the tokens of the group; advantage and clip scaled by the token's relative entropy h",
        "HAPO (public code starriver030515/HAPO)",
        "code",
        "no entropy-adaptive rollout temperature; h of low-entropy tokens is negative, as in the paper, not the code",
        advantage=TokenLevelUtility(ddof=1),
        gate=EntropyClip(dual_clip=10.0),
        token_weight=EntropyWeight(),
        aggregate=Aggregate("token-mean"),
    ),
    method(
        "gtpo",
        "c = -(R - mu - 0.1 H) / K, 0 where H > 0.7; tokens shared by good and bad count in the good only; no clip",
        "GTPO (public code winstonsmith1897/GTPO)",
        "code",
        "means over responses and prompts where the public code has sums",
        advantage=advantage.Advantage(temperature="dr-grpo"),
        credit=advantage.EntropyCost(),
        gate=Gate(),
        token_weight=Conflicts(),
    ),
    method(
        "earl",
        "GRPO on the 20% of the batch's tokens with the highest entropy; clip 0.2 / 0.28; token mean",
        "Beyond the 80/20 Rule, arXiv 2506.01939; EARL",
        "note",
        token_weight=TopEntropy(),
        gate=RatioClip(epsilon_high=0.28),
        aggregate=Aggregate("token-mean"),
    ),
    method(
        "d3s",
        "GRPO on the responses with the largest variance of A, and their tokens with the largest |A| H",
        "D3S",
        "note",
        "the schedules' first and last shares were not found",
        select=MaxVariance(),
        token_weight=TopImpact(),
    ),
    method(
        "capo-curvature",
        "GRPO without the tokens of largest A^2 |e - pi|^2 |h|^2",
        "CAPO (curvature-aware)",
        "note",
        "a proxy of the paper's second moments; its thresholds were not found, the share rejected is of its order",
        token_weight=CurvatureMask(),
    ),
    method(
        "capo-credit",
        "c = -A / K, A = R - penalty on the tokens of wrong steps, standardised over the tokens of the group",
        "CAPO (generative credit assignment)",
        "reconstructed",
        "the judge is a function of the user's; penalty and normalisation are guesses from the abstract",
        advantage=advantage.Utility(temperature="dr-grpo"),
        credit=advantage.StepPenalty(),
        hooks=(StepJudge(),),
    ),
    method(
        "grpo-vps",
        "c = -(A + progress of the token's segment) / K",
        "GRPO-VPS",
        "reconstructed",
        "how progress and advantage are joined was not found; segments are of equal length, not steps of the text",
        credit=advantage.Progress(),
        hooks=(PrefixValues(),),
    ),
    method(
        "brpo",
        "c = -A_s / K, A_s = return from budget s on - (s V_own + (S - s) V_group) / S",
        "AnytimeReasoner, arXiv 2505.13438",
        "code",
        "answers at the cuts are scored, not learnt from",
        advantage=advantage.Utility(temperature="dr-grpo"),
        credit=advantage.AnytimeReturns(),
        hooks=(Budgets(),),
    ),
    _gbmpo("l2", "coef (log q - log q0)^2", Bregman()),
    _gbmpo("l2kl", "coef (log q - log q0)^2 + beta k3", Bregman(), MIXED, note=MIXED_NOTE),
    _gbmpo("probl2", "coef (q - q0)^2", ProbL2()),
    _gbmpo("probl2kl", "coef (q - q0)^2 + beta k3", ProbL2(), MIXED, note=MIXED_NOTE),
    _gbmpo("mirror", "coef D_h(q || q0), h a learnt map of 126 units (`lpo meta`)", NeuralMirror()),
)
