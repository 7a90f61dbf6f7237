"""Images as a vision tower takes them: decoding, resizing, normalisation, and cutting into patches.

An `ImageProcessor` is what the `preprocessor_config.json` of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL directory describes.
The number of tokens of an image follows from its size alone, so that prompts can be counted without a model. Only numpy
and Pillow are needed; results equal those of transformers' processor for Pillow (`tests/test_image_patches.py`).
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from lpo_jax.errors import UserError
from lpo_jax.types import Json

FILE = "preprocessor_config.json"
_NESTED = "processor_config.json"  # of transformers v5: one file, with the settings for images inside
MOST_STRETCHED = 200  # the largest ratio of an image's sides
_BICUBIC = int(PIL.Image.Resampling.BICUBIC)

Grid = tuple[int, int]  # rows and columns of patches
Picture = np.ndarray | PIL.Image.Image  # uint8 [H, W, 3], or an image of Pillow in any mode


def to_rgb(image: Picture | bytes, where: str = "image") -> np.ndarray:
    """Return an image as uint8 `[H, W, 3]`: rotated as its EXIF data says, with transparency flattened on white.

    Args:
      image: an array `[H, W, 3]` uint8, an image of Pillow, or an encoded file (PNG, JPEG, ...).
      where: what the image is called in messages.

    Raises:
      UserError: the bytes cannot be decoded, or the array is not of this kind, or has no pixels.
    """
    if isinstance(image, bytes):
        image = _decoded(image, where)
    if isinstance(image, PIL.Image.Image):
        image = _flattened(image, where)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(
            f"{where}: an array must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}; convert it first"
        )
    if image.size == 0:
        raise UserError(f"{where}: has no pixels ({image.shape[1]} x {image.shape[0]}); leave it out")
    return image


def _decoded(data: bytes, where: str) -> PIL.Image.Image:
    try:
        image = PIL.Image.open(io.BytesIO(data))
    except Exception:  # Pillow's decoders raise errors of many kinds for damaged files
        raise UserError(f"{where}: not an image that can be decoded ({len(data)} bytes)") from None
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise UserError(f"{where}: has {frames} frames; videos and animations are not supported")
    return image


def _flattened(image: PIL.Image.Image, where: str) -> np.ndarray:
    try:
        image = PIL.ImageOps.exif_transpose(image)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = PIL.Image.alpha_composite(white, image)
        elif image.mode.startswith("I;16"):  # Pillow would cut off all grey levels above 255
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        return np.array(image.convert("RGB"))
    except Exception as error:  # the pixels are decoded here
        raise UserError(f"{where}: cannot be decoded ({error})") from None


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """A resized image, cut into patches, before it is normalised.

    Attributes:
      levels: `[rows * columns, 3, patch, patch]` uint8; the patches of a token are next to each other.
      grid: rows and columns of patches.
    """

    levels: np.ndarray
    grid: Grid

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the pixels and the grid: equal for images that look the same to a model."""
        return hashlib.sha256(f"{self.grid}".encode() + self.levels.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """How images become patches. The defaults are those of transformers for Qwen2-VL.

    Attributes:
      patch_size: height and width of a patch in pixels.
      merge_size: height and width, in patches, of the square that becomes one token.
      temporal_patch_size: frames of a patch; an image is repeated so many times.
      min_pixels, max_pixels: limits on the pixels of the resized image.
      mean, std: of each colour, for values of 0 to 1.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_directory(cls, path: Path) -> "ImageProcessor":
        """Read the processor of a model directory.

        Raises:
          UserError: there is none, it cannot be read, or it does something else than this class.
        """
        for name in (FILE, _NESTED):
            if not (path / name).exists():
                continue
            where = str(path / name)
            try:
                values = json.loads((path / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{where}: not readable as JSON ({error})") from None
            values = values.get("image_processor") if name == _NESTED and isinstance(values, dict) else values
            if isinstance(values, dict):
                return cls.from_json(values, where)
        raise UserError(f"{path}: a vision model needs its {FILE}, which is missing; download it too")

    @classmethod
    def from_json(cls, values: Mapping[str, Json], where: str = FILE) -> "ImageProcessor":
        """Read the values of a `preprocessor_config.json`.

        Raises:
          UserError: a value is of a wrong type, or asks for something else than this class does.
        """
        for key, only in _FIXED.items():
            if (value := values.get(key, only)) != only:
                raise UserError(f"{where}: {key} = {value!r} is not supported; only {only!r} is")
        limits = dict(values.get("size") or {})
        default = cls()
        least = _first(values.get("min_pixels"), limits.get("shortest_edge"), default.min_pixels)
        most = _first(values.get("max_pixels"), limits.get("longest_edge"), default.max_pixels)
        sizes = {
            name: _first(values.get(name), getattr(default, name))
            for name in ("patch_size", "merge_size", "temporal_patch_size")
        }
        for name, value in {**sizes, "min_pixels": least, "max_pixels": most}.items():
            if type(value) is not int or value < 1:
                raise UserError(f"{where}: {name} must be a positive integer, got {value!r}")
        if least > most:
            raise UserError(f"{where}: min_pixels = {least} exceeds max_pixels = {most}")
        colours = [
            _colours(values.get(f"image_{name}", getattr(default, name)), f"{where}: image_{name}")
            for name in ("mean", "std")
        ]
        return cls(**sizes, min_pixels=least, max_pixels=most, mean=colours[0], std=colours[1])

    def to_json(self) -> dict[str, Json]:
        """Return the `preprocessor_config.json`; `from_json` restores this processor from it."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_patch_size,
            # The names of transformers v4 and those of v5.
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            **_FIXED,
        }

    @property
    def patch_values(self) -> int:
        """The number of values of a patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def grid(self, height: int, width: int, where: str = "image") -> Grid:
        """Return the rows and columns of patches that an image of this size is resized to.

        Both sides become multiples of patch times merge size, and the area is brought between the limits; the ratio of
        the sides is kept as well as that allows.

        Raises:
          UserError: the image has no pixels, or one side is more than 200 times the other.
        """
        if min(height, width) < 1:
            raise UserError(f"{where}: has no pixels ({width} x {height}); leave it out")
        if max(height, width) > MOST_STRETCHED * min(height, width):
            raise UserError(
                f"{where}: {width} x {height} pixels; a side must not exceed {MOST_STRETCHED} times the other; crop it"
            )
        unit = self.patch_size * self.merge_size
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(side / scale / unit)) for side in (height, width))
        elif rows * columns * unit**2 < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * scale / unit) for side in (height, width))
        return rows * self.merge_size, columns * self.merge_size

    def num_tokens(self, grid: Grid) -> int:
        """Return the number of tokens of an image, which its placeholder expands to."""
        return grid[0] * grid[1] // self.merge_size**2

    def most_tokens(self, limit: int) -> int:
        """Return the largest number of tokens that an image can have, and that is at most `limit`."""
        return min(limit, self.max_pixels // (self.patch_size * self.merge_size) ** 2)

    def patches(self, image: Picture | bytes, where: str = "image") -> Patches:
        """Resize an image and cut it into patches.

        Args:
          image: as in `to_rgb`.
          where: what the image is called in messages.

        Raises:
          UserError: as in `to_rgb` and `grid`.
        """
        image = to_rgb(image, where)
        rows, columns = grid = self.grid(image.shape[0], image.shape[1], where)
        p, m = self.patch_size, self.merge_size
        size = columns * p, rows * p
        resized = np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BICUBIC))
        cut = resized.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        return Patches(cut.reshape(rows * columns, 3, p, p), grid)

    def __call__(self, image: Picture | bytes, where: str = "image") -> tuple[np.ndarray, Grid]:
        """Return the values that transformers' processor returns for an image; arguments as in `patches`.

        Returns:
          Normalised patches `[rows * columns, 3 * frames * patch * patch]` float32, and the grid (rows, columns).
        """
        cut = self.patches(image, where)
        levels = np.repeat(cut.levels[:, :, None], self.temporal_patch_size, axis=2)
        values = _levels(self.mean, self.std)[np.arange(3)[:, None, None, None], levels]
        return values.reshape(len(values), self.patch_values), cut.grid


# What other processors of transformers do, and this one does not.
_FIXED: Mapping[str, Json] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": _BICUBIC,
    "rescale_factor": 1 / 255,
}


@functools.cache
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """The normalised value of each of the 256 levels of each colour, `[3, 256]`, rounded as transformers does."""
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    centre, width = (np.array(x, np.float32)[:, None] for x in (mean, std))
    return (scaled - centre) / width


def _first(*values: Json) -> Json:
    return next(value for value in values if value is not None)


def _colours(values: Json, where: str) -> tuple[float, float, float]:
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(type(x) in (int, float) for x in values)
    ):
        raise UserError(f"{where}: expected three numbers, got {values!r}")
    return tuple(map(float, values))  # type: ignore[return-value]
