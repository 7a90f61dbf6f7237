"""The arrays that an objective can compute with, and who produces each of them in a run.

This is the only list of them. A part names the fields that it computes with (`Part.reads`), a hook the fields that it
fills (`HookSpec.gives`), and the trainer derives what it has to produce from `Objective.needs` and `Field.source`.
"""

import enum


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
