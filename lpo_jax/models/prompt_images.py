"""The images of prompts, laid out on the host: placeholders, positions, and the arrays that a vision tower reads.

A prompt holds one placeholder token for each token of its images. `PromptImages` says for each prompt token which
output of the tower replaces it, and where it is for rotary embeddings: a token of text is at one position, and one of
an image at a time, a row and a column (mrope). Text after an image continues behind its longer side.

The tower runs on rows of patches, one row for each shard of the batch. Images of different sizes are packed into rows;
for attention, patches are gathered into one padded sequence for each image or window. Sizes are rounded up, so that
images of any sizes need few compiled programs.

Axes: P prompts · S prompt tokens · M microbatches of the tower · B rows of a microbatch · C patches of a row.
"""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from lpo_jax.errors import UserError
from lpo_jax.images import Grid, Patches
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.packing import NOWHERE, balanced, stepped
from lpo_jax.models.vision_config import VisionConfig

# The most patches in a row of the tower, unless one image has more.
ROW_PATCHES = 8192

Images = Sequence[Patches]  # of one prompt, in order


class Sequences(struct.PyTreeNode):
    """Padded sequences of the patches of a row, of which each attends within itself.

    Attributes:
      unpack: `[M, B, sequences * size]` index in the row of each patch of the sequences; `NOWHERE` at padding.
      pack: `[M, B, C]` the inverse.
      size: patches of a padded sequence.
    """

    unpack: jax.Array
    pack: jax.Array
    size: int = struct.field(pytree_node=False)


class TowerRows(struct.PyTreeNode):
    """The images of a batch, packed into rows.

    Attributes:
      levels: `[M, B, C, 3, patch, patch]` uint8; the patches of a token are next to each other.
      place: `[M, B, C, 2]` row and column of each patch in its image.
      images: the patches of each image.
      windows: the patches of each attention window; None for a tower without windows.
      taps: `[M, B, C, 4]` rows of the learned table of positions that are interpolated for each patch, and
      weights: `[M, B, C, 4]` their weights; None for a tower without a table.
    """

    levels: jax.Array
    place: jax.Array
    images: Sequences
    windows: Sequences | None
    taps: jax.Array | None
    weights: jax.Array | None


class PromptImages(struct.PyTreeNode):
    """The images of P prompts.

    Attributes:
      rows: what the tower reads; None if no prompt has an image.
      index: `[P, S]` the tower's output for each prompt token, counted over all rows; `NOWHERE` at text.
      positions: `[P, S, 3]` time, row and column of each prompt token for rotary embeddings.
      next: `[P]` position of the first token after the prompt, less the length of the prompt.
    """

    rows: TowerRows | None
    index: jax.Array
    positions: jax.Array
    next: jax.Array

    def take(self, prompts: np.ndarray) -> "PromptImages":
        """Return what belongs to some prompts, without the rows of the tower. On the host only."""
        return PromptImages(None, self.index[prompts], self.positions[prompts], self.next[prompts])

    def extended(self, prompts: np.ndarray, lengths: np.ndarray, size: int) -> "PromptImages":
        """Return what belongs to sequences of some prompts and their responses, of `size` tokens with padding.

        Args:
          prompts: `[n]` indices.
          lengths: `[n]` tokens of these prompts.
          size: at least the longest of `lengths`.
        """
        taken, at = self.take(prompts), np.arange(size)
        source = np.minimum(at, self.index.shape[1] - 1)
        own = at < lengths[:, None]
        after = at + taken.next[:, None]
        return PromptImages(
            None,
            np.where(own, taken.index[:, source], NOWHERE).astype(np.int32),
            np.where(own[..., None], taken.positions[:, source], after[..., None]).astype(np.int32),
            taken.next,
        )


def expand(
    vision: VisionConfig | None, ids: Sequence[int], grids: Sequence[Grid], where: str = "the prompt"
) -> list[int]:
    """Return the ids with each image's placeholder repeated for every token of the image.

    Args:
      vision: the model's tower; None: it has none.
      ids: of a prompt, with one placeholder for each image.
      grids: of the images, in order.
      where: what the prompt is called in messages.

    Raises:
      UserError: the numbers of placeholders and images differ, the model has no tower, there is a video, or the prompt
        ends with an image.
    """
    if vision is None:
        if grids:
            raise UserError(f"{where} has images, but the model reads text only; take a vision model")
        return list(ids)
    if vision.video_token in ids:
        raise UserError(f"{where} has a video, which is not supported; give its frames as images")
    found = sum(token == vision.image_token for token in ids)
    if found != len(grids):
        raise UserError(
            f"{where} has {_count(found, 'image placeholder')} for {_count(len(grids), 'image')}; a placeholder is a "
            'part {"type": "image"} of a chat message'
        )
    if ids and ids[-1] == vision.image_token:
        raise UserError(f"{where} ends with an image; put text or the token that ends an image behind it")
    rest = iter(grids)
    expanded: list[int] = []
    for token in ids:
        expanded += [token] * (vision.processor.num_tokens(next(rest)) if token == vision.image_token else 1)
    return expanded


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def lay_out(
    config: ModelConfig,
    tokens: np.ndarray,
    mask: np.ndarray,
    images: Sequence[Images],
    shards: int = 1,
) -> PromptImages:
    """Lay out the images of prompts.

    Args:
      config: of a vision model.
      tokens: `[P, S]` ids with expanded placeholders.
      mask: `[P, S]`, true at real tokens.
      images: of each prompt.
      shards: B, the number of shards of the batch.

    Raises:
      UserError: placeholders and images of a row differ.
    """
    vision = config.vision
    positions, after = np.zeros((*tokens.shape, 3), np.int32), np.zeros(len(tokens), np.int32)
    number = np.full(tokens.shape, NOWHERE)  # of the output, counted image by image
    flat = [image for of_prompt in images for image in of_prompt]
    counts = [vision.processor.num_tokens(image.grid) for image in flat]
    starts, first = np.cumsum([0, *counts]), 0
    for p, of_prompt in enumerate(images):
        real = np.flatnonzero(mask[p])
        found, end = token_positions(vision, tokens[p, real], [image.grid for image in of_prompt], f"row {p}")
        positions[p, real], after[p] = found, end - len(real)
        last = first + len(of_prompt)
        number[p, real[tokens[p, real] == vision.image_token]] = np.arange(starts[first], starts[last])
        first = last
    if not flat:
        return PromptImages(None, number.astype(np.int32), positions, after)
    rows, of_output = _tower_rows(vision, flat, shards)
    index = np.where(number == NOWHERE, NOWHERE, np.append(of_output, 0)[np.minimum(number, len(of_output))])
    return PromptImages(rows, index.astype(np.int32), positions, after)


@functools.lru_cache(maxsize=8)
def abstract_images(config: ModelConfig, prompts: int, size: int, tokens: int, shards: int) -> PromptImages:
    """Return the shapes of what `lay_out` returns for prompts with one image each, as wide as it is high.

    Args:
      config: of a vision model.
      prompts: P.
      size: S, tokens of a padded prompt.
      tokens: the most tokens of an image.
      shards: B.
    """
    vision, columns = config.vision, math.isqrt(tokens)
    m, p = vision.processor.merge_size, vision.processor.patch_size
    grid = m * (tokens // columns), m * columns
    image = Patches(np.broadcast_to(np.uint8(0), (grid[0] * grid[1], 3, p, p)), grid)
    rows, _ = _tower_rows(vision, [image] * prompts, shards)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)  # noqa: E731
    return PromptImages(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows),
        of(prompts, size),
        of(prompts, size, 3),
        of(prompts),
    )


def token_positions(
    vision: VisionConfig, ids: np.ndarray, grids: Sequence[Grid], where: str
) -> tuple[np.ndarray, int]:
    """Return time, row and column `[n, 3]` of each token of a sequence, and the position after it.

    Raises:
      UserError: the placeholders are not those of these images.
    """
    m, placeholder = vision.processor.merge_size, vision.image_token
    found = np.zeros((len(ids), 3), np.int32)
    at = position = 0
    rest = iter(grids)
    while at < len(ids):
        if ids[at] != placeholder:
            found[at] = position
            at, position = at + 1, position + 1
            continue
        rows, columns = (side // m for side in next(rest, (0, 0)))
        if (
            rows == 0
            or not (ids[at : at + rows * columns] == placeholder).all()
            or at + rows * columns > len(ids)
        ):
            break
        row, column = np.divmod(np.arange(rows * columns), columns)
        found[at : at + rows * columns] = position + np.stack([np.zeros_like(row), row, column], -1)
        at, position = at + rows * columns, position + max(rows, columns)
    if at < len(ids) or next(rest, None) is not None:
        have = int((ids == placeholder).sum())
        want = sum(vision.processor.num_tokens(grid) for grid in grids)
        raise UserError(
            f"{where}: has {_count(have, 'image placeholder')}, but {_count(len(grids), 'image')} of {want} tokens; "
            "give one placeholder for each token of each image"
        )
    return found, position


def _tower_rows(vision: VisionConfig, images: Images, shards: int) -> tuple[TowerRows, np.ndarray]:
    """Return the rows, and the number of each output of the tower, image by image, among the outputs of all rows."""
    sizes = np.array([len(image.levels) for image in images])
    M = max(1, -(-int(sizes.sum()) // (ROW_PATCHES * shards)))
    rows = balanced(sizes, stepped(M, 2, least=1) * shards)
    unit = vision.processor.merge_size**2
    C = stepped(max(int(sizes[row].sum()) for row in rows), 2, least=16 * unit)
    R, p = len(rows), vision.processor.patch_size
    levels, place = np.zeros((R, C, 3, p, p), np.uint8), np.zeros((R, C, 2), np.int32)
    of_image, of_window = np.full((R, C), -1), np.full((R, C), -1)
    extent = np.ones((R, C, 2))
    outputs = [np.zeros(0, int)] * len(images)
    side = vision.window // vision.processor.patch_size
    for r, row in enumerate(rows):
        start = windows = 0
        for i, number in enumerate(sorted(row)):
            stop = start + sizes[number]
            grid = images[number].grid
            levels[r, start:stop] = images[number].levels
            place[r, start:stop] = patch_places(grid, vision.processor.merge_size)
            extent[r, start:stop] = grid
            of_image[r, start:stop] = i
            if side:
                across = -(-grid[1] // side)
                of_window[r, start:stop] = windows + place[r, start:stop] // side @ np.array([across, 1])
                windows += -(-grid[0] // side) * across
            outputs[number] = r * C // unit + np.arange(start // unit, stop // unit)
            start = stop
    shape = lambda x: x.reshape(-1, shards, *x.shape[1:])  # noqa: E731
    taps, weights = (None, None) if not vision.num_positions else _interpolation(vision, place, extent)
    longest = stepped(int(sizes.max()), 2, least=4 * unit)
    return TowerRows(
        levels=shape(levels),
        place=shape(place),
        images=_sequences(of_image, longest, shards),
        windows=_sequences(of_window, vision.window_patches, shards) if side else None,
        taps=None if taps is None else shape(taps),
        weights=None if weights is None else shape(weights),
    ), np.concatenate(outputs)


def patch_places(grid: Grid, merge: int) -> np.ndarray:
    """Return row and column `[rows * columns, 2]` of each patch of an image, in the order of `Patches.levels`."""
    places = np.moveaxis(np.indices(grid), 0, -1).astype(np.int32)
    blocks = places.reshape(grid[0] // merge, merge, grid[1] // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def _sequences(member: np.ndarray, size: int, shards: int) -> Sequences:
    """Gather the patches of a row by their sequence `member [R, C]`, -1 at padding."""
    R, C = member.shape
    count = stepped(int(member.max()) + 1, 2, least=1)
    unpack, pack = np.full((R, count * size), NOWHERE), np.full((R, C), NOWHERE)
    for r in range(R):
        order = np.argsort(member[r], kind="stable")
        order = order[member[r, order] >= 0]
        of = member[r, order]
        slot = of * size + np.arange(len(of)) - np.searchsorted(of, of)
        unpack[r, slot], pack[r, order] = order, slot
    shape = lambda x: x.reshape(-1, shards, x.shape[1]).astype(np.int32)  # noqa: E731
    return Sequences(shape(unpack), shape(pack), size)


def _interpolation(
    vision: VisionConfig, place: np.ndarray, extent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear interpolation of the square table of positions, whose corners are those of the image: rows of the
    table, and their weights, `[..., 4]`."""
    side = round(vision.num_positions**0.5)
    at = place.astype(np.float32) * np.float32(side - 1) / np.maximum(extent - 1, 1).astype(np.float32)
    low: np.ndarray = np.floor(at).astype(np.int32)
    part: np.ndarray = at - low
    low = np.minimum(low, side - 1)
    high = np.minimum(low + 1, side - 1)
    taps, weights = [], []
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = (high if i else low)[..., 0], (high if j else low)[..., 1]
        taps.append(row * side + column)
        weights.append((part if i else 1 - part)[..., 0] * (part if j else 1 - part)[..., 1])
    return np.stack(taps, -1).astype(np.int32), np.stack(weights, -1).astype(np.float32)
