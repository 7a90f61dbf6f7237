"""Running the model over groups: log-probs of given responses, and the gradient for given cotangents.

A group is a prompt with its K responses. The real tokens of groups are packed into rows (`packing.py`), and a prompt is
computed once for all of its responses. Training, hooks, the planner and the benchmarks use the same functions.

Axes: P prompts · K responses · S prompt tokens · T response tokens · J top-k tokens · D width ·
M microbatches · B rows of a microbatch · C tokens of a row · p prompts of a row, k responses of each, X predicted
tokens of a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from lpo_jax.models import decoder, packing
from lpo_jax.models.attend import accumulator
from lpo_jax.models.attention import SharedPrefix
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.head import token_log_probs, top_tokens, weighted_log_probs
from lpo_jax.models.kernels.choice import Attention
from lpo_jax.models.lora import Frozen, with_adapters
from lpo_jax.models.placement import constrain_params
from lpo_jax.models.prompt_images import Images, PromptImages, lay_out
from lpo_jax.models.rotary import mrope_table
from lpo_jax.models.vision import ImageTokens
from lpo_jax.objectives import Teacher, TokenStats
from lpo_jax.objectives.batch import Field
from lpo_jax.parallel.sharding import batch_shards, summed, whole
from lpo_jax.types import PyTree


class Groups(struct.PyTreeNode):
    """Token ids of groups, left-aligned and padded with 0. The mask of response tokens is in `objectives.Scored`.

    Attributes:
      prompts: `[P, S]`.
      lengths: `[P]` real tokens of the prompts, at least 1.
      responses: `[P, K, T]`.
      top_ids: `[P, K, T, J]` further tokens to compute log-probs of.
      layout: the packed layout. None: that of responses of T tokens each.
      pictures: `[P]` array of objects on the host, the images of each prompt (`prompt_images.Images`), which `pack`
        turns into `images`. None: there are none.
      images: of the prompts, for the device.
    """

    prompts: jax.Array
    lengths: jax.Array
    responses: jax.Array
    top_ids: jax.Array | None = None
    layout: packing.PackedLayout | None = None
    pictures: np.ndarray | None = None
    images: PromptImages | None = None


@dataclasses.dataclass(frozen=True)
class ModelRunner:
    """The settings with which the model runs over a batch. It is hashable, so that it can be static under jit.

    Attributes:
      config: the model's config.
      temperature: the sampler's temperature, so that log-probs are those of the sampling distribution.
      token_budget: the most tokens, with padding, in a row of a microbatch, which has one row for each shard.
      dtype: the dtype of activations and products.
      remat: whether to recompute layers in the backward pass.
      extra: which statistics of `Source.POLICY_EXTRA` to compute.
      attention: kernels or plain products (`lpo_jax.models.kernels.choice`).
    """

    config: ModelConfig
    temperature: float = 1.0
    token_budget: int = 8192
    dtype: DTypeLike = jnp.float32
    remat: bool = True
    extra: tuple[Field, ...] = ()
    attention: Attention = "auto"

    def pack(self, groups: Groups, mask: np.ndarray) -> Groups:
        """Plan the packed layout of groups and of their images on the host.

        Args:
          groups: the groups.
          mask: `[P, K, T]`. A response ends at its last true value; without one it does not run.
        """
        T = mask.shape[-1]
        sizes = (np.asarray(mask) * np.arange(1, T + 1)).max(-1)
        S = groups.prompts.shape[1]
        budget, shards = self.token_budget, batch_shards()
        layout = packing.plan_layout(groups.lengths, sizes, S, T, budget, shards)
        images = groups.images
        if groups.pictures is not None:
            real = np.arange(S) < np.asarray(groups.lengths)[:, None]
            images = lay_out(self.config, np.asarray(groups.prompts), real, groups.pictures, shards)
        return groups.replace(layout=layout, pictures=None, images=images)

    def rows(self, groups: Groups) -> tuple[packing.PackedLayout, "PackedRows"]:
        """Return the layout of the batch and its rows, with leaves `[M, B, ...]`."""
        (P, S), (_, K, T) = groups.prompts.shape, groups.responses.shape
        layout = groups.layout or packing.full_layout(P, K, S, T, self.token_budget, batch_shards())
        ids = jnp.concatenate([jnp.ravel(groups.prompts), jnp.ravel(groups.responses)])
        seen, positions = (None, None) if groups.images is None else _image_rows(groups, layout)
        return layout, PackedRows(
            seen=seen,
            positions=positions,
            tokens=packing.take(ids, layout.token),
            lengths=jnp.maximum(packing.take(groups.lengths, layout.prompt), 1),
            unpack=layout.unpack,
            pack=layout.pack,
            place=layout.place,
            targets=layout.to_rows(groups.responses),
            top_ids=None if groups.top_ids is None else layout.to_rows(groups.top_ids),
            prompt_size=S,
            num_responses=layout.num_responses,
            response_size=layout.response_size,
        )

    def image_outputs(self, params: decoder.Params, groups: Groups) -> jax.Array | None:
        """Run the vision tower once over the images of all prompts; None if there are none."""
        if groups.images is None:
            return None
        return decoder.image_outputs(self.config, params, groups.images.rows, self.dtype)

    def hidden(
        self, params: decoder.Params, rows: "PackedRows", outputs: jax.Array | None = None
    ) -> jax.Array:
        """Compute normed states `[B, C, D]` of all tokens. A prompt is computed once for all of its responses.

        Args:
          params: the parameters.
          rows: of a microbatch.
          outputs: `image_outputs` of the batch.
        """
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
            context.positions() if rows.positions is None else mrope_table(self.config, rows.positions),
            context,
            images=ImageTokens.of(outputs, rows.seen),
            dtype=self.dtype,
            remat=self.remat,
        )[0]

    def token_stats(
        self, params: decoder.Params, rows: "PackedRows", outputs: jax.Array | None = None
    ) -> TokenStats:
        """Compute the statistics of every response token, `[B, X]` each; arguments as in `hidden`."""
        states, unembed = rows.predicting(self.hidden(params, rows, outputs)), decoder.unembedding(params)
        return TokenStats(
            **token_log_probs(states, unembed, rows.targets, self.temperature, **self._options(rows))
        )

    def _options(self, rows: "PackedRows") -> dict[str, PyTree]:
        """The options of the head."""
        return {"top_ids": rows.top_ids, "extra": self.extra, "never": self.config.never_sampled}

    def pull_back(
        self, params: decoder.Params, groups: Groups, cotangent: TokenStats, frozen: Frozen | None = None
    ) -> tuple[decoder.Params, TokenStats]:
        """Compute the gradient of the loss (part 3 of a step), and the statistics from the same pass.

        The vision tower runs once, before the microbatches. If it is trained, they yield the gradient of its outputs,
        which is pulled back through it once, after them.

        Args:
          params: the parameters to differentiate by; with `frozen`, the adapters of that base.
          groups: the groups.
          cotangent: d loss / d statistics; None for a statistic that the loss does not depend on.
          frozen: the base of adapters, a frozen vision tower, or None.

        Returns:
          The gradient, at least float32, and the statistics `[P, K, T]`; 0 at tokens that are not in the layout.
        """
        layout, rows = self.rows(groups)
        given = {name: layout.to_rows(x) for name, x in vars(cotangent).items() if x is not None}
        own = {name: x for name, x in params.items() if name != "vision"}
        if own.keys() == params.keys():
            outputs = None
            fixed = frozen, self.image_outputs(with_adapters(frozen, params), groups)
        else:
            run = lambda tower: self.image_outputs(with_adapters(frozen, {"vision": tower}), groups)  # noqa: E731
            outputs, through_tower = jax.vjp(run, params["vision"])
            fixed = frozen, None
        (gradient, of_outputs), stats = self.accumulate((own, outputs), rows, layout.count, given, fixed)
        if own.keys() != params.keys():
            cast = lambda g, x: g.astype(x.dtype)  # noqa: E731
            (of_tower,) = through_tower(jax.tree.map(cast, of_outputs, outputs))
            gradient = {**gradient, "vision": constrain_params(self.config, _widened(of_tower))}
        return gradient, jax.tree.map(layout.from_rows, TokenStats(**stats))

    def accumulate(
        self,
        trained: tuple[decoder.Params, jax.Array | None],
        rows: "PackedRows",
        count: int | jax.Array,
        given: dict[str, jax.Array],
        fixed: tuple[Frozen | None, jax.Array | None],
    ) -> tuple[tuple[decoder.Params, jax.Array | None], dict[str, jax.Array]]:
        """Compute the sum of the gradients of the first `count` microbatches, and their statistics `[M, B, X]`.

        `trained` holds the parameters and `image_outputs` that are differentiated, `fixed` those that are not.

        Along `fsdp`, parameters are gathered and gradients reduced layer by layer, as memory requires. Along `data`,
        where devices have whole copies, gradients are reduced once.
        """

        def weighted(trained, fixed, rows, given):
            (params, outputs), (frozen, fixed_outputs) = trained, fixed
            policy, outputs = with_adapters(frozen, params), fixed_outputs if outputs is None else outputs
            states = rows.predicting(self.hidden(policy, rows, outputs))
            head = states, decoder.unembedding(policy), rows.targets, given, self.temperature
            return weighted_log_probs(*head, **self._options(rows))

        def microbatches(weights, batch):
            trained, fixed = weights
            microbatch = lambda i: jax.tree.map(lambda x: jnp.asarray(x)[i], batch)  # noqa: E731
            pull_back = lambda i: jax.grad(weighted, has_aux=True)(trained, fixed, *microbatch(i))  # noqa: E731

            # There is nothing to clear and to add up. Without tokens the gradient is 0.
            if len(rows.tokens) == 1:
                gradient, stats = pull_back(0)
                gradient = constrain_params(self.config, _widened(gradient))
                return gradient, jax.tree.map(lambda x: x[None], stats)

            def add(i, sums):
                total, stats = sums
                gradient, of_rows = pull_back(i)
                total = constrain_params(self.config, jax.tree.map(jnp.add, total, gradient))
                return total, jax.tree.map(lambda kept, x: kept.at[i].set(x), stats, of_rows)

            zero = jax.tree.map(lambda p: jnp.zeros(p.shape, accumulator(p.dtype)), trained)
            _, shapes = jax.eval_shape(weighted, trained, fixed, *microbatch(0))
            stats = jax.tree.map(lambda x: jnp.zeros((len(rows.tokens), *x.shape), x.dtype), shapes)
            return jax.lax.fori_loop(0, count, add, (constrain_params(self.config, zero), stats))

        return summed(microbatches, ("data",), dim=1)((trained, fixed), (rows, given))


def over_microbatches(run: Callable[[PyTree], PyTree], batch: PyTree, count: int | jax.Array) -> PyTree:
    """Run the first `count` of M microbatches one after the other.

    Args:
      run: from a microbatch, with leaves `[B, ...]`, to outputs.
      batch: leaves `[M, B, ...]`.

    Returns:
      Outputs with leaves `[M, ...]`; 0 for microbatches that did not run.
    """
    M = len(jax.tree.leaves(batch)[0])
    microbatch = lambda i: jax.tree.map(lambda x: jnp.asarray(x)[i], batch)  # noqa: E731
    if M == 1:
        return jax.tree.map(lambda x: x[None], run(microbatch(0)))
    outputs = jax.eval_shape(lambda: run(microbatch(0)))
    zero = jax.tree.map(lambda x: jnp.zeros((M, *x.shape), x.dtype), outputs)
    store = lambda i, kept: jax.tree.map(lambda k, x: k.at[i].set(x), kept, run(microbatch(i)))  # noqa: E731
    return jax.lax.fori_loop(0, count, store, zero)


def _widened(gradient: PyTree) -> PyTree:
    """A gradient in at least float32."""
    return jax.tree.map(lambda g: g.astype(accumulator(g.dtype)), gradient)


class PackedRows(struct.PyTreeNode):
    """The packed rows of a microbatch, of groups or splits of groups (`packing.PackedLayout`).

    Attributes:
      tokens: `[B, C]` ids.
      lengths: `[B, p]` real tokens of the prompts.
      unpack, pack: indices between the packed and the padded form, as in `SharedPrefix`.
      place: `[B, X]` index of each predicted token in the p k t response tokens of the padded row.
      targets: `[B, X]` ids of the predicted tokens.
      top_ids: `[B, X, J]` further ids to compute log-probs of.
      prompt_size, num_responses, response_size: S, k, t.
      seen: `[B, C]` the vision tower's output for each token, `packing.NOWHERE` at text; None without images.
      positions: `[B, C, 3]` time, row and column of each token; None without images.
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
    seen: jax.Array | None = None
    positions: jax.Array | None = None

    def predicting(self, hidden: jax.Array) -> jax.Array:
        """Select the states `[B, X, D]` that predict the targets from all states `[B, C, D]`.

        Token t of a response is predicted by its token t - 1, and the first one by the prompt's last token.
        """
        S, T, kT = self.prompt_size, self.response_size, self.num_responses * self.response_size
        place = jnp.minimum(self.place, self.lengths.shape[1] * kT - 1)
        split = place // kT
        last = jnp.take_along_axis(self.lengths, split, axis=1) - 1
        at = split * (S + kT) + jnp.where(place % T == 0, last, S + place % kT - 1)  # in the padded row
        if self.unpack is not None:
            at = jnp.take_along_axis(self.unpack, at, axis=1)
        return jax.vmap(packing.take)(hidden, at)


def picture_array(images: Sequence[Images]) -> np.ndarray | None:
    """Return the images of P prompts as `Groups.pictures`; None if there are none."""
    if not any(images):
        return None
    pictures = np.empty(len(images), object)
    for p, row in enumerate(images):
        pictures[p] = tuple(row)
    return pictures


def _image_rows(groups: Groups, layout: packing.PackedLayout) -> tuple[jax.Array, jax.Array]:
    """The fields `seen` and `positions` of packed rows, `[M, B, C]` and `[M, B, C, 3]`."""
    images, (P, K, T) = groups.images, groups.responses.shape
    text = jnp.full(P * K * T, packing.NOWHERE, jnp.int32)
    index = jnp.concatenate([jnp.ravel(images.index), text])
    seen = index.at[layout.token].get(mode="fill", fill_value=packing.NOWHERE)
    after = (jnp.asarray(groups.lengths) + images.next)[:, None, None] + jnp.arange(T)
    after = jnp.broadcast_to(after[..., None], (P, K, T, 3)).reshape(-1, 3)
    return seen, packing.take(jnp.concatenate([images.positions.reshape(-1, 3), after]), layout.token)


@functools.partial(jax.jit, static_argnums=0)
def score(runner: ModelRunner, params: decoder.Params, groups: Groups) -> TokenStats:
    """Compute the trainer's statistics `[P, K, T]` of given responses (part 1 of a step)."""
    layout, rows = runner.rows(groups)
    outputs = runner.image_outputs(params, groups)
    stats = over_microbatches(lambda rows: runner.token_stats(params, rows, outputs), rows, layout.count)
    return whole(jax.tree.map(layout.from_rows, stats))


@functools.partial(jax.jit, static_argnums=(0, 1))
def top_k_teacher(runner: ModelRunner, count: int, params: decoder.Params, groups: Groups) -> Teacher:
    """Compute the top `count` tokens at every position of given responses, as a teacher for all of them."""

    outputs = runner.image_outputs(params, groups)

    def top_k(rows):
        states = rows.predicting(runner.hidden(params, rows, outputs))
        head = states, decoder.unembedding(params), count, runner.temperature
        return top_tokens(*head, runner.config.never_sampled)

    layout, rows = runner.rows(groups)
    top = jax.tree.map(layout.from_rows, over_microbatches(top_k, rows, layout.count))
    return Teacher(**whole(top), valid=jnp.ones(groups.responses.shape[:2], bool))


@jax.jit
def log_prob_gap(sampled: TokenStats, scored: TokenStats, mask: jax.Array) -> dict[str, jax.Array]:
    """Compute the differences between two sets of log-probs of the same tokens. Masking bugs show here first.

    Args:
      mask: `[P, K, T]` the tokens to compare. Without any, all values are NaN.
    """
    tokens = mask.sum()
    logp = jnp.where(mask, jnp.abs(sampled.logp - scored.logp), 0.0)
    prob = jnp.where(mask, jnp.abs(jnp.exp(sampled.logp) - jnp.exp(scored.logp)), 0.0)
    gap = {
        "lpo/logp_gap_mean": logp.sum() / tokens,
        "lpo/logp_gap_max": logp.max(),
        "training/rollout_probs_diff_mean": prob.sum() / tokens,
        "training/rollout_probs_diff_max": prob.max(),
    }
    return {name: jnp.where(tokens > 0, value, jnp.nan) for name, value in gap.items()}
