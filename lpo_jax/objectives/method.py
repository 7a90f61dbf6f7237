"""An objective: a frozen composition of parts, as a pure function of arrays.

    grad = sum_k sum_t  W[k,t] * c_k(group) * gate(delta[k,t], c_k) * grad log pi(token)  +  grad of penalties

    signal      rewards -> u = (R - b) / tau, valid responses     shape, advantage, select, bias, prompt_weight, credit
    project     (u, s, s_t) -> c, the coefficient of a response   projection
    trust       (delta, c) -> token loss                          gate
    aggregate   tokens -> weights W                               token_weight, aggregate
    regular     token penalties                                   regular

c is a constant of the update: no gradient flows through it. `part.py` lists the kinds of parts, and `catalogue.py` the
named compositions.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lpo_jax.objectives.advantage import Advantage, AdvantageRule, Credit
from lpo_jax.objectives.batch import (
    Context,
    ControlState,
    Field,
    Listwise,
    Scored,
    Source,
    TokenStats,
    fields_from,
)
from lpo_jax.objectives.divergences import DIVERGENCES
from lpo_jax.objectives.hook_specs import HookPhase, HookSpec
from lpo_jax.objectives.part import Control, Part
from lpo_jax.objectives.projection import Projection
from lpo_jax.objectives.regular import Regular
from lpo_jax.objectives.shaping import Bias, Select, Shape
from lpo_jax.objectives.simplex import as_float, as_mask, centred, listwise_log_probs, masked_mean
from lpo_jax.objectives.trust import Gate, RatioClip
from lpo_jax.objectives.weights import Aggregate, PromptWeight, TokenWeight


@dataclasses.dataclass(frozen=True)
class Objective:
    """A method as a pure function `(stats, scored) -> (loss, metrics)`, hashable and compared by value.

    Create one with `get`, which checks the options. `part.py` documents each kind of part.

    Attributes:
      name: its name in the catalogue.
      aggregate: None for a loss on the scores, whose derivative gives the token weights.
      prompt_weight_inside: True divides the temperature by the prompt's weight, so that a larger weight makes the
        target sharper; False multiplies the prompt's loss. For a policy gradient, both are the same.
      degenerate: treatment of a group whose rewards are all equal. "keep": its target is P_t, so later minibatches of
        LPO move it back there, and it counts in the mean over prompts. "mask": it is left out, as if it had not been
        sampled. (LPO's paper does not specify this; "keep" is the literal reading.)
      min_group_size: minimum number of valid responses of a group, before selection. Smaller groups are left out.
    """

    name: str
    shape: tuple[Shape, ...] = ()
    advantage: AdvantageRule = Advantage()
    select: Select | None = None
    bias: Bias | None = None
    prompt_weight: PromptWeight | None = None
    credit: Credit | None = None
    projection: Projection = Projection()
    gate: Gate = RatioClip()
    token_weight: TokenWeight | None = None
    aggregate: Aggregate | None = Aggregate()
    regular: tuple[Regular, ...] = ()
    control: Control | None = None
    hooks: tuple[HookSpec, ...] = ()
    prompt_weight_inside: bool = False
    degenerate: str = "keep"
    min_group_size: int = 2

    def __post_init__(self) -> None:
        if self.credit is not None and type(self.projection) is not Projection:
            raise ValueError(
                "is for policy gradients: it gives the tokens of a response different advantages"
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, in the order of the fields."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        flat = (x for value in values for x in (value if isinstance(value, tuple) else (value,)))
        return tuple(x for x in flat if isinstance(x, Part))

    @property
    def needs(self) -> frozenset[Field]:
        """The optional fields of `TokenStats` and `Scored` that may not be None for this method."""
        return frozenset(name for part in self.parts for name in part.needs)

    @property
    def differentiates(self) -> frozenset[Field]:
        """The fields of `TokenStats` with respect to which the loss has a gradient; `logp` always is one."""
        penalties = (part for part in self.regular if part.coefficient)
        return frozenset({Field.LOGP}.union(*(part.differentiates for part in penalties)))

    @property
    def extra_updates(self) -> int:
        """Maximum number of updates that the hooks add to those of a step."""
        return sum(hook.phase is HookPhase.REPLAY for hook in self.hooks)

    def __call__(self, stats: TokenStats, scored: Scored) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss of a minibatch of whole groups, to be minimised, and its metrics.

        Args:
          stats: statistics of the current policy; differentiate with respect to them (`jax.grad(..., has_aux=True)`).
          scored: the sampled and verified responses.

        Returns:
          loss: for a listwise method, the divergence in nats, averaged over the active prompts; its gradient is that of
            the gated coefficients. For a policy gradient, the clipped surrogate. Token penalties are added.
          metrics: float32 scalars. All are finite if the log-probs of the response tokens are. A NaN log-prob means a
            broken model: it reaches the loss, where the guard of the training step detects it.

        Raises:
          ValueError: two arrays have inconsistent shapes, or a field that the method needs is None.
        """
        context, view, c, weight = self._look(jax.lax.stop_gradient(stats), scored)
        delta = _log_ratio(stats.logp, scored.behaviour_logp, context.tokens)
        with jax.named_scope("trust_and_aggregate"):
            W = self.token_weights(context.tokens)
            loss = (W * weight * self.gate(delta, c, context)).sum()
        value = self.projection.value(context, view.utilities, view.scores, view.log_target)
        if value is not None:
            # The value is that of the projection, the gradient that of the surrogate: the added term is exactly 0.
            loss = masked_mean(value, view.active) + (loss - jax.lax.stop_gradient(loss))
        metrics = self._metrics(context, view, delta) | {"actor/pg_loss": loss}
        with jax.named_scope("regular"):
            for part in self.regular:
                if part.coefficient:
                    # W expects a coefficient that includes 1 / K; a penalty is a plain mean over the responses.
                    penalty = (W * part(stats, context) / context.size[..., None]).sum()
                    loss, metrics = loss + part.weight(context) * penalty, metrics | {part.metric: penalty}
        return loss, {k: jax.lax.stop_gradient(v).astype(jnp.float32) for k, v in metrics.items()}

    def listwise(self, stats: TokenStats, scored: Scored) -> Listwise:
        """Return target, policy and coefficients of each group, before the gate and the mean over prompts."""
        return self._look(stats, scored)[1]

    def left_out(self, scored: Scored) -> jax.Array:
        """Return which groups [P] bool are inactive whatever the policy is, before its statistics are known.

        These are groups that are too small and, with `degenerate = "mask"`, groups of equal rewards. There are none if
        the shaped rewards depend on more than sampling and verification.

        Args:
          scored: the fields that sampling and verification fill.
        """
        given = fields_from(Source.SAMPLING)
        if not given.issuperset(name for part in self.shape for name in (*part.reads, *part.uses)):
            return jnp.zeros(jnp.shape(scored.rewards)[:1], bool)
        # A shape that uses them all the same gets rewards that are no numbers, which leave nothing out.
        unknown = TokenStats(jnp.full_like(scored.behaviour_logp, jnp.nan))
        return ~self._shaped(unknown, scored)[1]

    def token_weights(self, tokens: jax.Array) -> jax.Array:
        """Return weights W [P,K,T] of the tokens [P,K,T] to include."""
        return (self.aggregate or self.projection.token_weights)(tokens)

    def init_control(self) -> ControlState:
        """Return the state of the control at the start of a run, a pytree; None for a method without one."""
        return None if self.control is None else self.control.init()

    def next_control(self, stats: TokenStats, scored: Scored) -> ControlState:
        """Return the state of the control after an update on this minibatch."""
        if self.control is None:
            return None
        context, view, _, _ = self._look(jax.lax.stop_gradient(stats), scored)
        return self.control.update(scored.control, context, view)

    def _look(self, stats: TokenStats, scored: Scored) -> tuple[Context, Listwise, jax.Array, jax.Array]:
        """Return the masked minibatch, its groups, and coefficients and weights of the tokens ([P,K,1] if equal)."""
        _check_shapes(stats, scored)
        self._check_needs(stats, scored)
        with jax.named_scope("signal"):
            context, active, degenerate = self._shaped(stats, scored)
            valid = context.valid
            u, tau = self.advantage(context)
            if self.select is not None:
                # Responses that are left out have still entered the baseline: advantages use the group as sampled.
                valid &= self.select(context, u) | ~active[:, None]
                active &= valid.any(-1)
                u = jnp.where(valid, u, 0)
                context = _context(context.rewards, valid, stats, scored)
            # Groups that are left out do not enter the statistics of the minibatch either.
            tokens = context.tokens & active[:, None, None]
            context = dataclasses.replace(context, tokens=tokens, delta=jnp.where(tokens, context.delta, 0))
            if self.bias is not None:
                u = jnp.where(valid, self.bias(context, u), 0)
            if self.prompt_weight is not None and self.prompt_weight_inside:
                u = u * self.prompt_weight(context)
        with jax.named_scope("project"):
            s = self._scores(stats.logp, context)
            s_t = self._anchor_scores(context)
            log_w = self.projection.log_target(u, s_t, valid)
            by_token = u if self.credit is None else self.credit(context, u, tau)
            c = self.projection.coefficients(context, by_token, s, log_w)
            if self.prompt_weight is not None and not self.prompt_weight_inside:
                c = c * self.prompt_weight(context)[(...,) + (None,) * (c.ndim - 2)]
            c = c if c.ndim == 3 else c[..., None]  # [P,K,1] or [P,K,T]
            c = jnp.where(valid[..., None] & active[:, None, None], c, 0)
            c_k = c[..., 0] if c.shape[-1] == 1 else masked_mean(c, context.tokens, -1)
            weight = jnp.ones_like(c) if self.token_weight is None else self.token_weight(context, by_token)
        clipped = self.gate.acts(context.delta, c, context) | self.projection.clipped(context)[..., None]
        clipped &= context.tokens & (c != 0)
        log_p = listwise_log_probs(s, valid)
        rewards = context.rewards
        view = Listwise(valid, active, degenerate, rewards, tau, u, s, log_p, log_w, c_k, clipped)
        return context, view, c, weight

    def _shaped(self, stats: TokenStats, scored: Scored) -> tuple[Context, jax.Array, jax.Array]:
        """Return the minibatch with shaped rewards, and which groups [P] are active and which degenerate."""
        rewards = as_float(scored.rewards)
        valid = _marked(scored) & jnp.isfinite(rewards)
        context = _context(rewards, valid, stats, scored)
        for part in self.shape:
            context = dataclasses.replace(context, rewards=jnp.where(valid, part(context), 0))
        active = valid.sum(-1) >= self.min_group_size
        degenerate = active & (centred(context.rewards, valid) == 0).all(-1)
        if self.degenerate == "mask":
            active &= ~degenerate
        return context, active, degenerate

    def _scores(self, logp: jax.Array, context: Context) -> jax.Array:
        delta = self.gate.scored(_log_ratio(logp, context.scored.behaviour_logp, context.tokens))
        return self.projection.scores(logp, delta, context)

    def _anchor_scores(self, context: Context) -> jax.Array | None:
        """Return s_t [P,K], or None if it is 0 for every response."""
        anchor = context.scored.anchor_logp
        if anchor is None and not self.projection.absolute:
            return None
        return self._scores(context.scored.behaviour_logp if anchor is None else anchor, context)

    def _metrics(self, context: Context, view: Listwise, delta: jax.Array) -> dict[str, jax.Array]:
        delta = jax.lax.stop_gradient(delta)
        size = view.valid.sum(-1)  # [P]
        uniform = jnp.where(view.valid, 1 / jnp.maximum(size, 1)[:, None], 0)  # [P,K]
        marked = _marked(context.scored)

        def group_mean(x: jax.Array) -> jax.Array:
            return masked_mean(x, view.active)

        return {
            "lpo/target_tv": group_mean(0.5 * jnp.abs(view.target - uniform).sum(-1)),
            "lpo/policy_tv": group_mean(0.5 * jnp.abs(view.policy - uniform).sum(-1)),
            "lpo/coef_l1": group_mean(jnp.abs(view.coefficients).sum(-1)),
            "lpo/coef_sum": jnp.abs(jnp.where(view.active, view.coefficients.sum(-1), 0)).max(initial=0),
            "lpo/score_abs_max": jnp.abs(view.scores).max(initial=0),
            # Groups without signal are left out: their temperature is the floor, which would distort the mean.
            "lpo/temperature_mean": masked_mean(view.temperature[:, 0], view.active & ~view.degenerate),
            "lpo/degenerate_group_frac": masked_mean(view.degenerate, view.active | view.degenerate),
            "lpo/masked_response_frac": 1 - (view.valid & view.active[:, None]).mean(),
            "lpo/nonfinite_rewards": (marked & ~jnp.isfinite(as_float(context.scored.rewards))).sum(),
            "lpo/forward_kl": group_mean(DIVERGENCES["forward-kl"].value(view.log_policy, view.log_target)),
            # It is infinite if the target of a response is 0; such prompts are left out.
            "lpo/reverse_kl": masked_mean(
                DIVERGENCES["reverse-kl"].value(view.log_policy, view.log_target),
                view.active & ~(view.valid & (view.log_target == -jnp.inf)).any(-1),
            ),
            "actor/pg_clipfrac": masked_mean(view.clipped, context.tokens),
            "actor/ppo_kl": masked_mean(-delta, context.tokens),
        }

    def _check_needs(self, stats: TokenStats, scored: Scored) -> None:
        given = {**vars(stats), **vars(scored)}
        for name in sorted(self.needs):
            if given[name] is None:
                holder = "stats" if name in vars(stats) else "scored"
                raise ValueError(f"{self.name} needs {holder}.{name}, which is None")


def _marked(scored: Scored) -> jax.Array:
    """Return the responses [P,K] that the caller marks as valid and that have a token, whatever their reward."""
    has_token = (jnp.asarray(scored.mask) != 0).any(-1)
    return has_token & as_mask(scored.valid, has_token)


def _context(rewards: jax.Array, valid: jax.Array, stats: TokenStats, scored: Scored) -> Context:
    tokens = as_mask(scored.mask, jnp.asarray(stats.logp)) & valid[..., None]
    delta = _log_ratio(stats.logp, scored.behaviour_logp, tokens)
    return Context(jnp.where(valid, rewards, 0), valid, tokens, delta, stats, scored)


def _log_ratio(logp: jax.Array, behaviour_logp: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return delta [P,K,T], 0 outside `tokens` and exactly 0 if the two log-probs are the same number."""
    return jnp.where(tokens, as_float(logp) - as_float(behaviour_logp), 0)


def _check_shapes(stats: TokenStats, scored: Scored) -> None:
    shape = jnp.shape(stats.logp)
    if len(shape) != 3:
        raise ValueError(f"stats.logp: expected [P,K,T], got shape {shape}")
    for name, array, expected in (
        ("behaviour_logp", scored.behaviour_logp, shape),
        ("mask", scored.mask, shape),
        ("anchor_logp", scored.anchor_logp, shape),
        ("rewards", scored.rewards, shape[:2]),
        ("valid", scored.valid, shape[:2]),
    ):
        if array is not None and jnp.shape(array) != expected:
            raise ValueError(
                f"scored.{name}: expected shape {expected} from stats.logp {shape}, got {jnp.shape(array)}"
            )
