"""Packing: groups of a prompt and its responses are packed into rows, so that little is spent on padding.

A split is a prompt with all of its responses or with some of them, if the whole group exceeds the token budget or if
smaller splits fill the rows so much better that fewer tokens run, although the prompt then runs once with each split.
Splits are assigned to M microbatches of B rows, one row for each shard of the batch, balanced by real tokens. A row has
two forms:

  packed  `[C]`            the real tokens, concatenated; all matrix products run on this form
  padded  `[p (S + k t)]`  p splits of one prompt and k responses, padded; attention runs on this form

Lengths are known on the host, so a layout is planned there with numpy. Its sizes are static under jit. The gradient
runs only the responses that have a signal, and their number changes in every update, so sizes take few values: between
two powers of two, C has 4 steps and k has 2; X, which only the head depends on, is a multiple of C / 4; p and M are
powers of two; t is the power of two that fits the longest response; and `count` of the M microbatches run. If the
tokens vary by a factor of two, about thirteen programs are compiled; by a factor of eight, thirty. If there is no
padding, or too little to matter, both forms are the same.

Axes: P prompts · K responses · S prompt tokens · T response tokens · M microbatches · B rows of a microbatch ·
C tokens of a packed row · p splits of a row · k responses of a split · t padded tokens of each, at most T ·
X predicted tokens of a row.
"""

import dataclasses
import heapq

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

# Limit on the padded tokens of a row, as a multiple of the token budget. It bounds the padding that one long response
# causes in its row.
PADDED_BUDGETS = 8
# A layout may run this many times the tokens of the best one if it reuses the size of another program.
NEAR = 1.08
# Steps of C between two powers of two, and of X up to C.
STEPS = 4
# The ways to divide groups that are tried, in the order of preference: (n, more) divides a group that exceeds the nth
# part of the budget into the fewest parts that do not, and `more`. Parts of 2 + 2 + 2 + 2 responses can need less
# padding than 3 + 3 + 2.
DIVISIONS = ((1, 0), (1, 1), (2, 0), (4, 0))
Split = tuple[int, list[int]]  # a prompt, and the indices of its responses
NOWHERE = np.iinfo(np.int32).max  # an index past the end of every array; gathering there gives 0


class PackedLayout(struct.PyTreeNode):
    """The position of every token of a batch in packed rows. All indices are int32; `NOWHERE` marks empty positions.

    Attributes:
      prompt: `[M, B, p]` the prompt of each split.
      token: `[M, B, C]` index of each token in the P S prompt tokens followed by the P K T response tokens.
      unpack: `[M, B, p (S + k t)]` index in the packed row of each token of the padded row; None if both are the same.
      pack: `[M, B, C]` the inverse of `unpack`; None if both are the same.
      place: `[M, B, X]` index of each predicted token in the p k t response tokens of the padded row.
      source: `[M, B, X]` index of each predicted token in the P K T response tokens of the batch.
      back: `[P, K, T]` the inverse of `source`.
      slot: `[P, K]` index of each response in the M B p k responses of all rows.
      count: the number of microbatches that have tokens; those after them need not run.
      num_responses: k.
      response_size: t.
    """

    prompt: jax.Array
    token: jax.Array
    unpack: jax.Array | None
    pack: jax.Array | None
    place: jax.Array
    source: jax.Array
    back: jax.Array
    slot: jax.Array
    count: jax.Array
    num_responses: int = struct.field(pytree_node=False)
    response_size: int = struct.field(pytree_node=False)

    @property
    def num_tokens(self) -> int:
        """The number of tokens that run, without padding. A layout on the host only."""
        return int((self.token != NOWHERE).sum())

    @property
    def ran(self) -> jax.Array:
        """The response tokens that run, `[P, K, T]` bool."""
        return self.back != NOWHERE

    def to_rows(self, x: jax.Array) -> jax.Array:
        """Move `[P, K, T, ...]` into rows, `[M, B, X, ...]`."""
        return take(x.reshape(-1, *x.shape[3:]), self.source)

    def from_rows(self, x: jax.Array) -> jax.Array:
        """Move rows `[M, B, X, ...]` back to `[P, K, T, ...]`; 0 at padding."""
        return take(x.reshape(-1, *x.shape[3:]), self.back)

    def responses_from_rows(self, x: jax.Array) -> jax.Array:
        """Move responses of rows, `[M, B, p, k, ...]`, back to `[P, K, ...]`."""
        return take(x.reshape(-1, *x.shape[4:]), self.slot)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Gather `x[index]` along the first axis; 0 where the index is `NOWHERE`."""
    return jnp.asarray(x).at[index].get(mode="fill", fill_value=0)


def plan_layout(
    lengths: np.ndarray,
    response_lengths: np.ndarray,
    S: int,
    T: int,
    token_budget: int,
    shards: int = 1,
    *,
    exact: bool = False,
) -> PackedLayout:
    """Plan the packed layout of a batch of groups.

    Args:
      lengths: `[P]` real tokens of the prompts.
      response_lengths: `[P, K]` tokens of the responses to run. A response of 0 tokens does not run, and neither does a
        prompt whose responses all have 0 tokens.
      S, T: the padded lengths of prompts and responses.
      token_budget: the most tokens in a packed row. The smallest split is one response with its prompt; it runs even if
        it exceeds the budget.
      shards: B, the number of shards of the batch.
      exact: do not round M, p and k up, and divide groups into the fewest splits that fit, even if more would need less
        padding. For a batch whose sizes are always the same.
    """
    lengths, sizes = np.asarray(lengths), np.asarray(response_lengths)
    (P, K), t = sizes.shape, _longest(sizes, T)
    splits, k, p, rows = _best(lengths, sizes, S, t, token_budget, shards, exact)
    count = sum(map(bool, rows[::shards]))
    if not exact:
        rows = rows + [[]] * (shards * stepped(len(rows) // shards, 1, least=1) - len(rows))
    R = len(rows)

    prompt, response = np.full((R, p), P), np.full((R, p, k), P * K)
    for r, row in enumerate(rows):
        for i, split in enumerate(sorted(row)):
            group, chosen = splits[split]
            prompt[r, i] = group
            response[r, i, : len(chosen)] = group * K + np.array(chosen)
    size = np.append(sizes.reshape(-1), 0)[response]  # [R, p, k]
    own = np.arange(t) < size[..., None]  # [R, p, k, t]
    real = np.concatenate(
        [np.arange(S) < np.append(lengths, 0)[prompt][..., None], own.reshape(R, p, k * t)], axis=-1
    )
    of_prompt = prompt[..., None] * S + np.arange(S)
    source = np.where(own, response[..., None] * T + np.arange(t), NOWHERE)
    token = np.concatenate([of_prompt, P * S + np.where(own, source, 0).reshape(R, p, k * t)], axis=-1)
    real, token = real.reshape(R, -1), np.where(real, token, NOWHERE).reshape(R, -1)

    most = int(real.sum(-1).max())
    pack = _compressed(real, _row_size(most, token_budget))
    C = real.shape[1] if pack is None else pack.shape[1]
    own, source = own.reshape(R, -1), source.reshape(R, -1)
    step = max(16, C // STEPS)
    place = _compressed(own, min(-(-max(int(own.sum(-1).max()), 1) // step) * step, C))
    place = np.broadcast_to(np.arange(own.shape[1]), own.shape) if place is None else place
    source = _along(source, place)
    shape = lambda x: None if x is None else x.reshape(-1, shards, *x.shape[1:]).astype(np.int32)  # noqa: E731
    return PackedLayout(
        prompt=shape(np.where(prompt < P, prompt, NOWHERE)),
        token=shape(token if pack is None else _along(token, pack)),
        unpack=None if pack is None else shape(_inverse_rows(pack, real.shape[1])),
        pack=shape(pack),
        place=shape(place),
        source=shape(source),
        back=_inverse(source, P * K * T).reshape(P, K, T).astype(np.int32),
        slot=_inverse(np.where(response < P * K, response, NOWHERE), P * K).reshape(P, K).astype(np.int32),
        count=count,
        num_responses=k,
        response_size=t,
    )


def full_layout(P: int, K: int, S: int, T: int, token_budget: int, shards: int = 1) -> PackedLayout:
    """Plan the layout of a batch without padding, in rows as large as the budget allows.

    Its rows are the largest that batches with padding have, so `lpo plan` uses it to determine memory.
    """
    return plan_layout(np.full(P, S), np.full((P, K), T), S, T, token_budget, shards, exact=True)


@dataclasses.dataclass(frozen=True)
class PackedSize:
    """The sizes of a layout without its indices.

    Attributes:
      microbatches: the number of microbatches that run.
      tokens: C, tokens of a packed row.
      padded: tokens of a padded row, the form that attention runs on.
      splits: splits of all rows together; a prompt runs once with each of its splits.
    """

    microbatches: int
    tokens: int
    padded: int
    splits: int


def packed_size(
    lengths: np.ndarray,
    response_lengths: np.ndarray,
    S: int,
    T: int,
    token_budget: int,
    shards: int = 1,
    *,
    exact: bool = False,
) -> PackedSize:
    """Return the sizes of the layout that `plan_layout` plans from the same arguments, in a fraction of its time."""
    lengths, sizes = np.asarray(lengths), np.asarray(response_lengths)
    t = _longest(sizes, T)
    splits, k, p, rows = _best(lengths, sizes, S, t, token_budget, shards, exact)
    tokens = [lengths[group] + sizes[group, chosen].sum() for group, chosen in splits]
    most, padded = max(sum(int(tokens[split]) for split in row) for row in rows), p * (S + k * t)
    packed = _row_size(most, token_budget)
    return PackedSize(sum(map(bool, rows[::shards])), min(packed, padded), padded, len(splits))


def full_splits(K: int, S: int, T: int, token_budget: int) -> int:
    """Return the number of splits of a group in `full_layout`."""
    return -(-K // min(max((token_budget - S) // T, 1), K))


def stepped(n: int, steps: int = 8, least: int = 16) -> int:
    """Round n up to a padded size: a multiple of `least`, and one of `steps` values between two powers of two."""
    n = max(n, 1)
    step = max(least, (1 << n.bit_length() - 1) // steps)
    return -(-n // step) * step


def _longest(sizes: np.ndarray, T: int) -> int:
    """Return t: the longest response, rounded up to a power of two, but at most T."""
    return min(stepped(int(sizes.max(initial=0)), 1), T)


def _row_size(most: int, token_budget: int) -> int:
    """Return C for rows of at most `most` real tokens."""
    return min(stepped(most, STEPS), max(token_budget, most))


def _best(lengths, sizes, S, t, budget, shards, exact) -> tuple[list[Split], int, int, list[list[int]]]:
    """Return the splits, k, p, and the indices of the splits in each of the M B rows."""
    found: list[tuple[int, list[Split], int, int, list[list[int]]]] = []
    for n, more in DIVISIONS[: 1 if exact else None]:
        of_group = [_divide(*group, budget // n, more) for group in zip(lengths, sizes)]
        splits = [(p, part) for p, parts in enumerate(of_group) for part in parts]
        if any(splits == others for _, others, *_ in found):
            continue
        tokens = np.array([lengths[p] + sizes[p, part].sum() for p, part in splits])
        k = max((len(part) for _, part in splits), default=1)
        k = k if exact else min(stepped(k, 2, least=1), sizes.shape[1])
        cost, p, rows = _assign(tokens, S + k * t, budget, shards, exact)
        found.append((cost, splits, k, p, rows))
    best = min(cost for cost, *_ in found)
    _, splits, k, p, rows = next(layout for layout in found if layout[0] <= NEAR * best)
    return splits, k, p, rows


def _divide(length: int, sizes: np.ndarray, budget: int, more: int) -> list[list[int]]:
    """Divide the responses of a group, if they do not fit, evenly into the fewest parts that fit, and `more`."""
    present = np.flatnonzero(sizes).tolist()
    if length + sizes.sum() <= budget or len(present) <= 1:
        return [present] if present else []
    parts = min(len(_filled(sizes, present, budget - length)) + more, len(present))
    low, high = int(sizes.max()), max(int(sizes.max()), budget - length)
    while low < high:  # find the smallest size that needs no more parts
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(sizes, present, middle)) <= parts else (middle + 1, high)
    return _filled(sizes, present, low)


def _filled(sizes: np.ndarray, present: list[int], most: int) -> list[list[int]]:
    """Fill parts of at most `most` tokens with consecutive responses; a response that is too long is a part alone."""
    parts: list[list[int]] = [[]]
    total = 0
    for k in present:
        size = int(sizes[k])
        if parts[-1] and total + size > most:
            parts.append([])
            total = 0
        parts[-1].append(k)
        total += size
    return parts


def _assign(
    tokens: np.ndarray, padded: int, budget: int, shards: int, exact: bool
) -> tuple[int, int, list[list[int]]]:
    """Assign splits to M B rows; return the cost, which is the number of tokens that run with padding, p, and the rows.

    M ranges from the fewest microbatches that fit to twice as many, in steps of an eighth of the fewest. The first M
    whose cost is near the best is taken, so that consecutive steps tend to have the same M and so the same program.

    Args:
      tokens: real tokens of each split.
      padded: tokens of any split in the padded form.
      budget: the token budget.
      shards: B.
      exact: as in `plan_layout`.
    """
    n, widest = len(tokens), max(1, PADDED_BUDGETS * budget // padded)
    found: list[tuple[int, int, list[list[int]]]] = []
    M, least = 1, n
    while not found or M <= min(2 * least, -(-n // shards)):
        rows = balanced(tokens, M * shards)
        load = max(sum(int(tokens[split]) for split in row) for row in rows)
        p = max(1, len(rows[0]))
        if found or (load <= budget and p <= widest) or M * shards >= n:
            least = min(least, M)
            p = p if exact else min(stepped(p, 1, least=1), max(p, widest))
            found.append((M * min(_row_size(load, budget), p * padded), p, rows))
        M += max(1, least // 8) if found else 1
    best = min(cost for cost, *_ in found)
    return next(layout for layout in found if layout[0] <= NEAR * best)


def balanced(tokens: np.ndarray, R: int) -> list[list[int]]:
    """Assign splits to R rows, largest first, each to the row with the fewest tokens; rows have about equally many."""
    most = -(-len(tokens) // R)
    rows: list[list[int]] = [[] for _ in range(R)]
    loads = [(0, r) for r in range(R)]  # a heap of the rows with room
    for split in np.argsort(-tokens, kind="stable").tolist():
        load, r = heapq.heappop(loads)
        rows[r].append(split)
        if len(rows[r]) < most:
            heapq.heappush(loads, (load + int(tokens[split]), r))
    return sorted(rows, key=len, reverse=True)


def _compressed(real: np.ndarray, size: int) -> np.ndarray | None:
    """Indices `[R, size]` of the real tokens of each row; None if `size` does not shorten the rows."""
    if size >= real.shape[1]:
        return None
    order = np.argsort(~real, axis=-1, kind="stable")[:, :size]
    return np.where(_along(real, order), order, NOWHERE)


def _along(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Gather `x[r, index[r]]` in each row; `NOWHERE` (for bool: False) where the index is `NOWHERE`."""
    fill = False if x.dtype == bool else NOWHERE
    return np.where(index == NOWHERE, fill, np.take_along_axis(x, np.where(index == NOWHERE, 0, index), -1))


def _inverse(index: np.ndarray, size: int) -> np.ndarray:
    """Return `[size]`: the position in the flat `index` of each number."""
    flat = index.reshape(-1)
    inverse = np.full(size, NOWHERE)
    inverse[flat[flat != NOWHERE]] = np.flatnonzero(flat != NOWHERE)
    return inverse


def _inverse_rows(index: np.ndarray, size: int) -> np.ndarray:
    """Apply `_inverse` to each row: `[R, size]`."""
    return np.stack([_inverse(row, size) for row in index])
