"""Which tokens run together: whole groups packed into rows, so that padding costs almost nothing.

A piece is a prompt with all of its responses, or, where a whole group exceeds the token budget, with some of them;
then the prompt runs once with each piece. Pieces are dealt to M microbatches of B rows, one row for each
shard of the batch, evenly in real tokens. Two forms of a row:

  packed  `[C]`            real tokens one after another; all matrix products run on it
  padded  `[p (S + k T)]`  p pieces of one prompt and k responses, padded; attention runs on it

Lengths are known on the host, so a layout is planned there in numpy. Its sizes are static under jit and few: between
two powers of two C takes 8 steps and X, which matters to the head alone, 4. A run whose responses grow compiles about
twenty programs for each doubling of its tokens. Where nothing, or too little to matter, is padded, both forms are
the same.

Axes: P prompts · K responses · S prompt tokens · T response tokens · M microbatches · B rows of a microbatch ·
C tokens of a packed row · p pieces of a row · k responses of a piece · X predicted tokens of a row.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

# Padded attention holds at most this many times the token budget: one long response must not blow up the others' rows.
PADDED_BUDGETS = 8
# A layout may run this many times the tokens of the best one, where that saves a program.
NEAR = 1.08
Piece = tuple[int, list[int]]  # a prompt, and which of its responses
NOWHERE = np.iinfo(np.int32).max  # an index past the end of every array: what is gathered there is 0


@struct.dataclass
class Layout:
    """Where every token of a batch runs; int32 indices, `NOWHERE` in places that stay empty.

    Attributes:
      prompt: `[M, B, p]` of each piece.
      token: `[M, B, C]` in the P S prompt tokens followed by the P K T response tokens.
      unpack: `[M, B, p (S + k T)]` in the packed row; pack: `[M, B, C]` in the padded row. None where they are equal.
      place: `[M, B, X]` of each predicted token in the row's p k T response places.
      source: `[M, B, X]` of each predicted token in the batch's P K T; back: `[P, K, T]`, its inverse.
      slot: `[P, K]` of each response in the M B p k of all rows.
      num_responses: k.
    """

    prompt: jax.Array
    token: jax.Array
    unpack: jax.Array | None
    pack: jax.Array | None
    place: jax.Array
    source: jax.Array
    back: jax.Array
    slot: jax.Array
    num_responses: int = struct.field(pytree_node=False)

    def split(self, x: jax.Array) -> jax.Array:
        """`[P, K, T, ...]` to `[M, B, X, ...]`."""
        return take(x.reshape(-1, *x.shape[3:]), self.source)

    def join(self, x: jax.Array) -> jax.Array:
        """`[M, B, X, ...]` back to `[P, K, T, ...]`; 0 at padding."""
        return take(x.reshape(-1, *x.shape[3:]), self.back)

    def join_responses(self, x: jax.Array) -> jax.Array:
        """`[M, B, p, k, ...]` back to `[P, K, ...]`."""
        return take(x.reshape(-1, *x.shape[4:]), self.slot)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]` along the first axis; 0 where the index is `NOWHERE`."""
    return jnp.asarray(x).at[index].get(mode="fill", fill_value=0)


def plan(
    lengths: np.ndarray,
    response_lengths: np.ndarray,
    S: int,
    T: int,
    token_budget: int,
    shards: int = 1,
    *,
    cuts: tuple[int, ...] = (0, 1),
) -> Layout:
    """Packs a batch of groups.

    Args:
      lengths: `[P]` real tokens of the prompts; response_lengths: `[P, K]`.
      S, T: what prompts and responses are padded to.
      token_budget: most tokens in a packed row. One response with its prompt is the smallest piece there is, and
        runs even where it exceeds this.
      shards: B.
      cuts: into how many pieces more than fit a group that exceeds the budget may be cut, where that runs fewer
        tokens: three responses, three and two take longer than four times two.
    """
    lengths, sizes = np.asarray(lengths), np.asarray(response_lengths)
    P, K = sizes.shape
    pieces, k, rows = _best(lengths, sizes, S, T, token_budget, shards, cuts)
    R, p = len(rows), max(map(len, rows))

    prompt, response = np.full((R, p), P), np.full((R, p, k), P * K)
    for r, row in enumerate(rows):
        for i, piece in enumerate(sorted(row)):
            group, chosen = pieces[piece]
            prompt[r, i] = group
            response[r, i, : len(chosen)] = group * K + np.array(chosen)
    size = np.append(sizes.reshape(-1), 0)[response]  # [R, p, k]
    own = np.arange(T) < size[..., None]  # [R, p, k, T]
    real = np.concatenate(
        [np.arange(S) < np.append(lengths, 0)[prompt][..., None], own.reshape(R, p, k * T)], axis=-1
    )
    of_prompt = prompt[..., None] * S + np.arange(S)
    source = np.where(own, response[..., None] * T + np.arange(T), NOWHERE)
    token = np.concatenate([of_prompt, P * S + np.where(own, source, 0).reshape(R, p, k * T)], axis=-1)
    real, token = real.reshape(R, -1), np.where(real, token, NOWHERE).reshape(R, -1)

    most = int(real.sum(-1).max())
    pack = _compressed(real, min(stepped(most), max(token_budget, most)))
    C = real.shape[1] if pack is None else pack.shape[1]
    own, source = own.reshape(R, -1), source.reshape(R, -1)
    place = _compressed(own, min(stepped(max(int(own.sum(-1).max()), 1), 4), C))
    place = np.broadcast_to(np.arange(own.shape[1]), own.shape) if place is None else place
    source = _along(source, place)
    shape = lambda x: None if x is None else x.reshape(-1, shards, *x.shape[1:]).astype(np.int32)  # noqa: E731
    return Layout(
        prompt=shape(np.where(prompt < P, prompt, NOWHERE)),
        token=shape(token if pack is None else _along(token, pack)),
        unpack=None if pack is None else shape(_inverse_rows(pack, real.shape[1])),
        pack=shape(pack),
        place=shape(place),
        source=shape(source),
        back=_inverse(source, P * K * T).reshape(P, K, T).astype(np.int32),
        slot=_inverse(np.where(response < P * K, response, NOWHERE), P * K).reshape(P, K).astype(np.int32),
        num_responses=k,
    )


def full(P: int, K: int, S: int, T: int, token_budget: int, shards: int = 1) -> Layout:
    """The layout of a batch without padding, in rows as large as the budget allows: by these `lpo plan` knows what
    memory takes, and ragged batches have such rows."""
    return plan(np.full(P, S), np.full((P, K), T), S, T, token_budget, shards, cuts=(0,))


def full_pieces(K: int, S: int, T: int, token_budget: int) -> int:
    """How many pieces a group without padding is cut into there."""
    return -(-K // min(max((token_budget - S) // T, 1), K))


def stepped(n: int, steps: int = 8) -> int:
    """The padded size for n: 16 at least, then the power of two below and that many steps to the next."""
    step = max(16, (1 << n.bit_length() - 1) // steps)
    return -(-n // step) * step


def _best(lengths, sizes, S, T, budget, shards, cuts) -> tuple[list[Piece], int, list[list[int]]]:
    """The pieces, k, and which of them lie in each of the M B rows."""
    found = []
    for more in cuts:
        pieces = [(p, part) for p in range(len(lengths)) for part in _cut(lengths[p], sizes[p], budget, more)]
        tokens = np.array([lengths[p] + sizes[p, part].sum() for p, part in pieces])
        k = max(len(part) for _, part in pieces)
        cost, rows = _deal(tokens, S + k * T, budget, shards)
        found.append((cost, pieces, k, rows))
    best = min(cost for cost, *_ in found)
    return next(rest for cost, *rest in found if cost <= NEAR * best)


def _cut(length: int, sizes: np.ndarray, budget: int, more: int) -> list[list[int]]:
    """The responses of a group that run together: all, or as few parts as fit and `more`, as even as can be."""
    if length + sizes.sum() <= budget or len(sizes) == 1:
        return [list(range(len(sizes)))]
    parts = min(len(_filled(sizes, budget - length)) + more, len(sizes))
    low, high = int(sizes.max()), max(int(sizes.max()), budget - length)
    while low < high:  # the smallest size that does with so many parts
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(sizes, middle)) <= parts else (middle + 1, high)
    return _filled(sizes, low)


def _filled(sizes: np.ndarray, most: int) -> list[list[int]]:
    """Runs of responses, each as long as fits into `most` tokens; a response that alone does not fit is a run."""
    parts, total = [[]], 0
    for k, size in enumerate(sizes.tolist()):
        if parts[-1] and total + size > most:
            parts.append([])
            total = 0
        parts[-1].append(k)
        total += size
    return parts


def _deal(tokens: np.ndarray, padded: int, budget: int, shards: int) -> tuple[int, list[list[int]]]:
    """Pieces to M B rows: of the least M that fits up to its double, the first that is near the best. With its cost.

    What counts is the tokens that run, padding included; the first, because the same M step after step is the same
    program.

    Args:
      tokens: of each piece; padded: of any, in the padded form.
    """
    n, widest = len(tokens), max(1, PADDED_BUDGETS * budget // padded)
    found, M, least = [], 1, n
    while not found or M <= min(2 * least, -(-n // shards)):
        rows = _balanced(tokens, M * shards)
        load = max(sum(int(tokens[piece]) for piece in row) for row in rows)
        if found or (load <= budget and len(rows[0]) <= widest) or M * shards >= n:
            least = min(least, M)
            found.append((M * min(stepped(load), len(rows[0]) * padded), rows))
        M += 1
    best = min(cost for cost, _ in found)
    return next((cost, rows) for cost, rows in found if cost <= NEAR * best)


def _balanced(tokens: np.ndarray, R: int) -> list[list[int]]:
    """Pieces to R rows, largest first, each to the emptiest row; no row takes more than its share of the pieces."""
    most = -(-len(tokens) // R)
    rows, loads = [[] for _ in range(R)], np.zeros(R)
    for piece in np.argsort(-tokens, kind="stable"):
        r = int(np.argmin(loads))
        rows[r].append(int(piece))
        loads[r] = np.inf if len(rows[r]) == most else loads[r] + tokens[piece]
    return sorted(rows, key=len, reverse=True)


def _compressed(real: np.ndarray, size: int) -> np.ndarray | None:
    """Indices `[R, size]` of each row's real places; None where that is no shorter than all of them."""
    if size >= real.shape[1]:
        return None
    order = np.argsort(~real, axis=-1, kind="stable")[:, :size]
    return np.where(_along(real, order), order, NOWHERE)


def _along(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`x[r, index[r]]` of each row; `NOWHERE` (False) where the index is."""
    fill = False if x.dtype == bool else NOWHERE
    return np.where(index == NOWHERE, fill, np.take_along_axis(x, np.where(index == NOWHERE, 0, index), -1))


def _inverse(index: np.ndarray, size: int) -> np.ndarray:
    """`[size]`: where in the flat `index` each number stands."""
    flat = index.reshape(-1)
    inverse = np.full(size, NOWHERE)
    inverse[flat[flat != NOWHERE]] = np.flatnonzero(flat != NOWHERE)
    return inverse


def _inverse_rows(index: np.ndarray, size: int) -> np.ndarray:
    """`_inverse` of each row: `[R, size]`."""
    return np.stack([_inverse(row, size) for row in index])
