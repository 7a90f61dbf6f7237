"""The model run over groups: log-probs of given responses, and the gradient that pulls a cotangent back.

A group is a prompt with its K responses. Real tokens of whole groups are packed into rows (`packing.py`), and a prompt
is computed once for all of its responses. The same functions serve training, hooks, the planner and benchmarks.

Axes: P prompts · K responses · S prompt tokens · T response tokens · J top-k tokens · D width ·
M microbatches · B rows of a microbatch · C tokens of a row · p prompts of a row, k responses of each, X predicted
tokens of a row.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lpo_jax.models import decoder, packing
from lpo_jax.models.attend import accumulator
from lpo_jax.models.attention import Attention, SharedPrefix
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.head import token_log_probs, top_tokens, weighted_log_probs
from lpo_jax.models.lora import Frozen, join
from lpo_jax.models.placement import constrain_params
from lpo_jax.objectives import Teacher, TokenStats
from lpo_jax.objectives.fields import Field
from lpo_jax.parallel.sharding import batch_shards, summed, whole


@struct.dataclass
class Groups:
    """Token ids of whole groups, left-aligned and padded with 0.

    prompts `[P, S]`, lengths `[P]` (at least 1), responses `[P, K, T]`; which response tokens count is the
    scored record's mask. top_ids `[P, K, T, J]` are tokens whose log-probs are wanted beside the sampled ones'.
    layout says which tokens run together; None: as if every response had T tokens.
    """

    prompts: jax.Array
    lengths: jax.Array
    responses: jax.Array
    top_ids: jax.Array | None = None
    layout: packing.Layout | None = None


@dataclasses.dataclass(frozen=True)
class ModelRunner:
    """How the model is run over a batch; hashable, so that it can be static under jit.

    Attributes:
      temperature: the sampler's; scores are of the distribution that was sampled from.
      token_budget: most tokens, padding included, in one row of a microbatch; there is a row for each shard of the
        batch.
      remat: recompute layers in the backward pass.
      extra: which statistics of `Source.POLICY_EXTRA` to compute.
      attention: kernels for TPUs, or plain products (`lpo_jax.models.attention`).
    """

    config: ModelConfig
    temperature: float = 1.0
    token_budget: int = 8192
    dtype: Any = jnp.float32
    remat: bool = True
    extra: tuple[Field, ...] = ()
    attention: Attention = "auto"

    def pack(self, groups: Groups, mask: np.ndarray) -> Groups:
        """Groups laid out by their real tokens, which end at the last true place of `mask [P, K, T]`; on the host."""
        T = mask.shape[-1]
        sizes = (np.asarray(mask) * np.arange(1, T + 1)).max(-1)
        S = groups.prompts.shape[1]
        layout = packing.plan(groups.lengths, sizes, S, T, self.token_budget, batch_shards())
        return groups.replace(layout=layout)

    def rows(self, groups: Groups) -> tuple[packing.Layout, "PackedRows"]:
        """The batch as it runs; leaves `[M, B, ...]`."""
        (P, S), (_, K, T) = groups.prompts.shape, groups.responses.shape
        layout = groups.layout or packing.full(P, K, S, T, self.token_budget, batch_shards())
        ids = jnp.concatenate([jnp.ravel(groups.prompts), jnp.ravel(groups.responses)])
        return layout, PackedRows(
            tokens=packing.take(ids, layout.token),
            lengths=jnp.maximum(packing.take(groups.lengths, layout.prompt), 1),
            unpack=layout.unpack,
            pack=layout.pack,
            place=layout.place,
            targets=layout.split(groups.responses),
            top_ids=None if groups.top_ids is None else layout.split(groups.top_ids),
            prompt_size=S,
            num_responses=layout.num_responses,
            response_size=T,
        )

    def hidden(self, params: decoder.Params, rows: "PackedRows") -> jax.Array:
        """Normed states `[B, C, D]` of all tokens. A prompt is computed once for all of its responses."""
        context = SharedPrefix(
            rows.lengths,
            rows.unpack,
            rows.pack,
            rows.prompt_size,
            rows.num_responses,
            rows.response_size,
            self.attention,
        )
        return decoder.forward(
            self.config,
            params,
            rows.tokens,
            context.positions(),
            context,
            dtype=self.dtype,
            remat=self.remat,
        )[0]

    def token_stats(self, params: decoder.Params, rows: "PackedRows") -> TokenStats:
        """What the model says about every response token; `[B, X]` each."""
        states = rows.predicting(self.hidden(params, rows))
        unembed, options = decoder.unembedding(params), {"top_ids": rows.top_ids, "extra": self.extra}
        return TokenStats(**token_log_probs(states, unembed, rows.targets, self.temperature, **options))

    def pull_back(
        self, params: decoder.Params, groups: Groups, cotangent: TokenStats, frozen: Frozen | None = None
    ) -> tuple[decoder.Params, TokenStats]:
        """Part 3: the gradient (at least float32), and the statistics the model gave on the way.

        Args:
          params: what the gradient is of; with `frozen`, the adapters of that base.
          cotangent: d loss / d statistics; a statistic that is None there has no say.
        """
        layout, rows = self.rows(groups)
        given = {name: layout.split(x) for name, x in vars(cotangent).items() if x is not None}
        gradient, stats = self.accumulate(params, rows, given, frozen)
        return gradient, jax.tree.map(layout.join, TokenStats(**stats))

    def accumulate(
        self, params: decoder.Params, rows: "PackedRows", given: dict[str, jax.Array], frozen: Frozen | None
    ) -> tuple[decoder.Params, dict[str, jax.Array]]:
        """The sum of the gradients of all microbatches, and their statistics `[M, B, X]`.

        Parameters that are split (`fsdp`) are gathered and their gradients added up layer by layer, as they must be
        to fit; those of whole copies (`data`) are added up once.
        """

        def weighted(params, frozen, rows, given):
            policy = join(frozen, params)
            states, unembed = rows.predicting(self.hidden(policy, rows)), decoder.unembedding(policy)
            options = {"top_ids": rows.top_ids, "extra": self.extra}
            return weighted_log_probs(states, unembed, rows.targets, given, self.temperature, **options)

        def microbatches(weights, batch):
            params, frozen = weights

            def piece(total, xs):
                gradient, stats = jax.grad(weighted, has_aux=True)(params, frozen, *xs)
                return constrain_params(self.config, jax.tree.map(jnp.add, total, gradient)), stats

            zero = jax.tree.map(lambda p: jnp.zeros(p.shape, accumulator(p.dtype)), params)
            return jax.lax.scan(piece, constrain_params(self.config, zero), batch)

        return summed(microbatches, ("data",), dim=1)((params, frozen), (rows, given))


@struct.dataclass
class PackedRows:
    """A microbatch as it runs: packed rows of whole groups, or of pieces of them (`packing.Layout`).

    Attributes:
      tokens: `[B, C]` ids; lengths: `[B, p]` of the prompts.
      unpack, pack: between packed and padded form, as in `SharedPrefix`.
      place: `[B, X]` of each predicted token among the p k T response places; targets: its id; top_ids: `[B, X, J]`.
      prompt_size, num_responses, response_size: S, k, T.
    """

    tokens: jax.Array
    lengths: jax.Array
    unpack: jax.Array | None
    pack: jax.Array | None
    place: jax.Array
    targets: jax.Array
    top_ids: jax.Array | None
    prompt_size: int = struct.field(pytree_node=False)
    num_responses: int = struct.field(pytree_node=False)
    response_size: int = struct.field(pytree_node=False)

    def predicting(self, hidden: jax.Array) -> jax.Array:
        """The states `[B, X, D]` that the targets are predicted from, of all states `[B, C, D]`.

        Token t of a response is predicted by its token t - 1, the first one by the prompt's last token.
        """
        S, T, kT = self.prompt_size, self.response_size, self.num_responses * self.response_size
        place = jnp.minimum(self.place, self.lengths.shape[1] * kT - 1)
        piece = place // kT
        last = jnp.take_along_axis(self.lengths, piece, axis=1) - 1
        at = piece * (S + kT) + jnp.where(place % T == 0, last, S + place % kT - 1)  # in the padded row
        if self.unpack is not None:
            at = jnp.take_along_axis(self.unpack, at, axis=1)
        return jax.vmap(packing.take)(hidden, at)


@functools.partial(jax.jit, static_argnums=0)
def score(runner: ModelRunner, params: decoder.Params, groups: Groups) -> TokenStats:
    """Part 1: the trainer's statistics `[P, K, T]` of given responses."""
    layout, rows = runner.rows(groups)
    stats = jax.lax.map(lambda rows: runner.token_stats(params, rows), rows)
    return whole(jax.tree.map(layout.join, stats))


@functools.partial(jax.jit, static_argnums=(0, 1))
def top_k_teacher(runner: ModelRunner, count: int, params: decoder.Params, groups: Groups) -> Teacher:
    """The `count` likeliest tokens at every place of given responses, as a teacher for all of them."""

    def likely(rows):
        states = rows.predicting(runner.hidden(params, rows))
        return top_tokens(states, decoder.unembedding(params), count, runner.temperature)

    layout, rows = runner.rows(groups)
    top = jax.tree.map(layout.join, jax.lax.map(likely, rows))
    return Teacher(**whole(top), valid=jnp.ones(groups.responses.shape[:2], bool))


@jax.jit
def log_prob_gap(sampled: TokenStats, scored: TokenStats, mask: jax.Array) -> dict[str, jax.Array]:
    """How far two sets of log-probs of the same tokens are apart; the first alarm of any masking bug."""
    tokens = jnp.maximum(mask.sum(), 1)
    logp = jnp.where(mask, jnp.abs(sampled.logp - scored.logp), 0.0)
    prob = jnp.where(mask, jnp.abs(jnp.exp(sampled.logp) - jnp.exp(scored.logp)), 0.0)
    return {
        "lpo/logp_gap_mean": logp.sum() / tokens,
        "lpo/logp_gap_max": logp.max(),
        "training/rollout_probs_diff_mean": prob.sum() / tokens,
        "training/rollout_probs_diff_max": prob.max(),
    }
