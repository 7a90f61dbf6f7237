"""The inputs of an objective and its view of a group: small pytrees of arrays.

Axis letters: P prompts, K responses per prompt, T response tokens, J top-k tokens at a position. Log-probs are in nats.

`Field` is the only list of the arrays that an objective can compute with, and of who produces each of them in a run. A
part names the fields that it computes with (`Part.reads`), a hook the fields that it fills (`HookSpec.gives`), and the
trainer derives what it has to produce from `Objective.needs` and `Field.source`.
"""

import enum
from typing import Any, TypeAlias, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

# The state of a `Control`: a pytree of arrays whose structure only that control knows.
ControlState: TypeAlias = Any

T = TypeVar("T")


def required(value: T | None) -> T:
    """Return a field that a part names in its `reads`: `Objective` has checked that it is there.

    Raises:
      TypeError: the field is None, so the part reads a field that it does not name.
    """
    if value is None:
        raise TypeError("a part reads a field that is missing from its `reads`")
    return value


class TokenStats(flax.struct.PyTreeNode):
    """Statistics of the current policy at the sampled tokens. An objective is differentiated with respect to them.

    All fields but `logp` are None unless the method needs them (`objective.needs`).

    Attributes:
      logp: [P,K,T] log-prob of each sampled token under the current policy. Padded positions may hold any value.
      entropy: [P,K,T] entropy of the next-token distribution.
      ref_logp: [P,K,T] log-probs under a frozen reference policy.
      top_logp: [P,K,T,J] log-probs of the tokens `Scored.teacher.ids`.
      collision: [P,K,T] sum of the squared next-token probabilities.
      hidden_norm: [P,K,T] Euclidean norm of the hidden state from which the next token is predicted.
    """

    logp: jax.Array
    entropy: jax.Array | None = None
    ref_logp: jax.Array | None = None
    top_logp: jax.Array | None = None
    collision: jax.Array | None = None
    hidden_norm: jax.Array | None = None


class Teacher(flax.struct.PyTreeNode):
    """Next-token distributions to stay near or to learn from, each reduced to its top-k tokens.

    Attributes:
      ids: [P,K,T,J] int32, the top-k tokens of the teacher.
      logp: [P,K,T,J] their log-probs under the teacher; all other tokens form one bin.
      entropy: [P,K,T] entropy of the teacher's full distribution.
      valid: [P,K] bool, the responses that have a teacher.
    """

    ids: jax.Array
    logp: jax.Array
    entropy: jax.Array
    valid: jax.Array


class Scored(flax.struct.PyTreeNode):
    """Sampled and verified responses: constants of the update.

    Most methods use the first five fields only. The others are None unless something fills them; `objective.needs`
    names those that a method requires.

    Attributes:
      behaviour_logp: [P,K,T] log-probs under the behaviour policy pi_b, which sampled the responses.
      rewards: [P,K] one number per response. Invalid responses may hold any value; a non-finite reward makes its
        response invalid (and is counted in `lpo/nonfinite_rewards`).
      mask: [P,K,T] 1 on response tokens, the end token included; 0 on padding.
      anchor_logp: [P,K,T] log-probs under pi_t, the policy at the start of the update. None means pi_t = pi_b, so that
        s_t = 0 and the target of LPO is w* = softmax(R / tau). This is the case in every run of `lpo train`, as in
        algorithm 1 of the paper, which sets pi_t and pi_b to the same policy at the start of an iteration. The field
        is for callers of the public functions whose pi_t differs from pi_b.
      valid: [P,K] 1 on the responses to train on. None means all that have a token.
      passed: [P,K] bool, the verifier's verdict. None means rewards above 0.5.
      malformed: [P,K] bool, no answer in the required format. None means none.
      truncated: [P,K] bool, cut at the token limit. None means none.
      token_ids: [P,K,T] int32.
      clusters: [P,K] int32; responses of a group with the same final answer share a number, -1 means no answer.
      baseline: [P,K] or [P,1] baseline of the rewards: the reward of a greedy response, or a probe's prediction.
      flawed: [P,K] bool, passed, but a judge found a wrong step.
      credit: [P,K,T] score of each token, from a judge or a probe.
      prompt_confidence: [P] confidence of the policy in the least likely tokens of the prompt, 0 to 1.
      features: [P,K,F] input of a linear probe; the features of the end of the prompt come first.
      teacher: next-token distributions of a teacher.
      weight: [P] weight of each prompt's loss, from a hook.
      sampler_logp: [P,K,T] log-probs as the sampler computed them, if `behaviour_logp` is the trainer's.
      progress: scalar, 0 at the first step of the run and 1 at its last step.
      control: the state of `objective.control`.
    """

    behaviour_logp: jax.Array
    rewards: jax.Array
    mask: jax.Array
    anchor_logp: jax.Array | None = None
    valid: jax.Array | None = None
    passed: jax.Array | None = None
    malformed: jax.Array | None = None
    truncated: jax.Array | None = None
    token_ids: jax.Array | None = None
    clusters: jax.Array | None = None
    baseline: jax.Array | None = None
    flawed: jax.Array | None = None
    credit: jax.Array | None = None
    prompt_confidence: jax.Array | None = None
    features: jax.Array | None = None
    teacher: Teacher | None = None
    weight: jax.Array | None = None
    sampler_logp: jax.Array | None = None
    progress: jax.Array | None = None
    control: ControlState = None


class Context(flax.struct.PyTreeNode):
    """A minibatch as the parts of a method see it: masked, with the rewards shaped so far, and without gradient.

    Attributes:
      rewards: [P,K] float, 0 where invalid.
      valid: [P,K] bool, the response belongs to its group.
      tokens: [P,K,T] bool, the tokens of valid responses; after the selection, those of active groups only.
      delta: [P,K,T] log-ratio of the current policy to the behaviour policy, 0 outside `tokens`.
      stats, scored: the inputs of the objective, unchanged.
    """

    rewards: jax.Array
    valid: jax.Array
    tokens: jax.Array
    delta: jax.Array
    stats: TokenStats
    scored: Scored

    @property
    def size(self) -> jax.Array:
        """Number of valid responses of each group [P,1], at least 1."""
        return jnp.maximum(self.valid.sum(-1, keepdims=True), 1)

    @property
    def lengths(self) -> jax.Array:
        """Number of tokens of each response [P,K]; 0 where invalid."""
        return self.tokens.sum(-1)

    @property
    def passed(self) -> jax.Array:
        """Which responses passed, [P,K] bool; False where invalid."""
        by_verdict = self.scored.rewards > 0.5 if self.scored.passed is None else self.scored.passed != 0
        return by_verdict & self.valid

    @property
    def pass_rate(self) -> jax.Array:
        """Share of the valid responses that passed [P,1]."""
        return self.passed.sum(-1, keepdims=True) / self.size


class Listwise(flax.struct.PyTreeNode):
    """The group-level view of an update. `objective.listwise` computes it, and the rollout files are written from it.

    Attributes:
      valid: [P,K] bool, the response belongs to its group: marked valid, has a token, has a finite reward, selected.
      active: [P] bool, the group counts in the loss and in every mean.
      degenerate: [P] bool, the group is large enough but its rewards are all equal.
      rewards: [P,K] the rewards after shaping; 0 where the response has no valid reward.
      temperature: [P,1] tau, in units of reward.
      utilities: [P,K] u = (R - b) / tau with the method's biases, the advantage of a policy gradient; 0 where invalid.
      scores: [P,K] s_k, the log-ratio of response k to the behaviour policy, in nats; 0 where invalid.
      log_policy: [P,K] log P = log softmax(s); -inf where invalid.
      log_target: [P,K] log w*, by default of w* = softmax(u + s_t); -inf where invalid.
      coefficients: [P,K] c_k = d (the prompt's loss) / d s_k, before the gate and the mean over prompts; 0 in
        an inactive group. If the tokens of a response have different coefficients, their mean.
      clipped: [P,K,T] bool, the tokens with a coefficient whose gradient the trust region removes or limits.
    """

    valid: jax.Array
    active: jax.Array
    degenerate: jax.Array
    rewards: jax.Array
    temperature: jax.Array
    utilities: jax.Array
    scores: jax.Array
    log_policy: jax.Array
    log_target: jax.Array
    coefficients: jax.Array
    clipped: jax.Array

    @property
    def policy(self) -> jax.Array:
        """P [P,K], 0 where invalid."""
        return jnp.exp(self.log_policy)

    @property
    def target(self) -> jax.Array:
        """w* [P,K], 0 where invalid."""
        return jnp.exp(self.log_target)


class Source(enum.Enum):
    """Who fills a field of `TokenStats` or `Scored` in a run."""

    SAMPLING = "sampling and verification: every round has it"
    POLICY = "the head of the model, in every forward pass of the current policy"
    POLICY_EXTRA = "the head of the model, in a forward pass that asks for it"
    REFERENCE = "a forward pass of the frozen reference policy"
    OBSERVATION = "one pass of the policy over the round before its first update"
    RESCORING = "`training.behaviour = rescored`"
    TRAINER = "the state of the trainer"
    HOOK = "a hook of the method"
    CALLER = "no part of a run; only a caller of the public functions"


class Field(enum.StrEnum):
    """A field of `TokenStats` or `Scored`; it equals the field's name.

    Attributes:
      source: who fills the field in a run.
    """

    source: Source

    # TokenStats
    LOGP = "logp", Source.POLICY
    ENTROPY = "entropy", Source.POLICY
    REF_LOGP = "ref_logp", Source.REFERENCE
    TOP_LOGP = "top_logp", Source.POLICY  # of the tokens `Scored.teacher.ids`
    COLLISION = "collision", Source.POLICY_EXTRA
    HIDDEN_NORM = "hidden_norm", Source.POLICY_EXTRA
    # Scored
    BEHAVIOUR_LOGP = "behaviour_logp", Source.SAMPLING
    REWARDS = "rewards", Source.SAMPLING
    MASK = "mask", Source.SAMPLING
    ANCHOR_LOGP = "anchor_logp", Source.CALLER
    VALID = "valid", Source.SAMPLING
    PASSED = "passed", Source.SAMPLING
    MALFORMED = "malformed", Source.SAMPLING
    TRUNCATED = "truncated", Source.SAMPLING
    TOKEN_IDS = "token_ids", Source.SAMPLING
    CLUSTERS = "clusters", Source.SAMPLING
    BASELINE = "baseline", Source.HOOK
    FLAWED = "flawed", Source.HOOK
    CREDIT = "credit", Source.HOOK
    PROMPT_CONFIDENCE = "prompt_confidence", Source.OBSERVATION
    FEATURES = "features", Source.OBSERVATION
    TEACHER = "teacher", Source.HOOK
    WEIGHT = "weight", Source.HOOK
    SAMPLER_LOGP = "sampler_logp", Source.RESCORING
    PROGRESS = "progress", Source.TRAINER
    CONTROL = "control", Source.TRAINER

    def __new__(cls, name: str, source: Source) -> "Field":
        field = str.__new__(cls, name)
        field._value_ = name
        field.source = source
        return field


def fields_from(*sources: Source) -> frozenset[Field]:
    """The fields that any of these sources fills."""
    return frozenset(field for field in Field if field.source in sources)
