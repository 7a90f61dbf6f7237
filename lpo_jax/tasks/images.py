"""Images of rows: encoded files, which are decoded only where their pixels are needed.

A row's images are in its field `images`, a list of `EncodedImage` in the order of the marks `<image>` in its prompt. In
files, they are one or several of:

- a path, absolute or relative to a folder. If the folder has no such file, it is looked up in the folder's tar files.
- `FILE.tar::MEMBER`, a member of a tar file, whose path may be relative too;
- bytes, or `{"bytes": ..., "path": ...}`, as parquet files of the hub hold them. The path is then only a name.
"""

import dataclasses
import functools
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lpo_jax.errors import UserError, nearest
from lpo_jax.types import Json

if TYPE_CHECKING:
    import numpy as np

MARK = "<image>"  # where an image stands in a prompt

_VIDEO = re.compile(r"\.(?:mp4|m4v|mov|avi|mkv|webm|mpe?g|wmv|flv)$", re.IGNORECASE)
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that exchange height and width


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image as it is stored: PNG, JPEG, or another format that Pillow reads.

    Attributes:
      data: the content of the file.
      source: where it was found: a path, `FILE.tar::MEMBER`, or a name.
    """

    data: bytes = dataclasses.field(repr=False)
    source: str

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256 of the encoded bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, after rotation; read from the header without decoding the pixels."""
        import PIL.Image  # imported here, like numpy below, because tasks are imported by processes without images

        with PIL.Image.open(io.BytesIO(self.data)) as image:
            width, height = image.size
            return (width, height) if image.getexif().get(_ORIENTATION) in _SIDEWAYS else (height, width)

    def pixels(self) -> "np.ndarray":
        """Decode the image: uint8 `[H, W, 3]`, with transparency flattened on white.

        Raises:
          UserError: if it cannot be decoded or has no pixels.
        """
        from lpo_jax.images import to_rgb

        if not self.data:
            raise UserError(f"image {self.source}: the file is empty")
        if _VIDEO.search(self.source):
            raise UserError(f"{self.source}: videos are not supported; give images")
        return to_rgb(self.data, f"image {self.source}")

    @property
    def name(self) -> str:
        """The first 16 digits of the hash, by which the files of a run refer to the image."""
        return self.hash[:16]

    def reference(self) -> dict[str, Json]:
        """Return what the records of responses keep of the image: its name, source, height and width."""
        height, width = self.size
        return {"name": self.name, "source": self.source, "height": height, "width": width}


def row_images(row: Mapping[str, Json]) -> list[EncodedImage]:
    """Return the images of a task's row; empty for a row of text."""
    images = row.get("images")
    held = isinstance(images, list) and all(isinstance(image, EncodedImage) for image in images)
    return images if held else []


def without_images(row: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return a row without its images, which verifiers do not need: rows are sent to them with every response."""
    return {name: value for name, value in row.items() if name != "images"} if row_images(row) else row


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Reads the images of a file's rows.

    Attributes:
      names: names of the field with the images, in order of preference.
      folder: the folder, or a tar file, that paths are relative to; by default the folder of the file with the rows.
    """

    names: Sequence[str]
    folder: str = ""

    def read(self, row: Mapping[str, Json], beside: Path) -> list[EncodedImage]:
        """Read the images of a row and check that they can be decoded.

        Args:
          row: the row of the file.
          beside: the folder of the file.

        Raises:
          UserError: if the row has no field for images, or an image is missing, cannot be decoded, has no pixels, or is
            a video.
        """
        images = []
        for value in self._values(row):
            data, name = (
                (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
            )
            if isinstance(data, bytes):
                image = EncodedImage(data, str(name or "without a name"))
            else:
                image = self._found(name if isinstance(value, Mapping) else value, beside)
            image.pixels()
            images.append(image)
        return images

    def files(self, row: Mapping[str, Json], beside: Path) -> Iterator[Path]:
        """Yield the files that hold the images of a row, except for images that are in the row itself.

        Raises:
          UserError: if one is missing.
        """
        for value in self._values(row):
            if isinstance(value, Mapping):
                value = value.get("path") if value.get("bytes") is None else b""
            if not isinstance(value, bytes):
                yield self._locate(value, beside)[0]

    def _values(self, row: Mapping[str, Json]) -> list[Json]:
        if row.get("videos"):
            raise UserError("the row has videos, which are not supported")
        for name in self.names:
            if name in row:
                value = row[name]
                return [] if value is None else value if isinstance(value, list) else [value]
        raise UserError(
            f"no field {self.names[0]!r} with images{nearest(self.names[0], row)}; it has {', '.join(row)}"
        )

    def _found(self, name: Json, beside: Path) -> EncodedImage:
        path, member = self._locate(name, beside)
        try:
            data = _member(path, member) if member else path.read_bytes()
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"image {name}: {path} cannot be read ({error})") from None
        return EncodedImage(data, f"{path}::{member}" if member else str(path))

    def _locate(self, name: Json, beside: Path) -> tuple[Path, str]:
        """Return the file of an image and, if it is a tar file, the member."""
        if not isinstance(name, str) or not name:
            raise UserError(f"image {str(name)[:60]!r}: expected a path, bytes, or both as bytes and path")
        folder = Path(os.path.expanduser(self.folder)) if self.folder else beside
        archive, separator, member = name.rpartition("::")
        if separator:
            path = folder / os.path.expanduser(archive)
            if member not in _index(path, name):
                raise UserError(
                    f"image {name}: {path} has no member {member!r}{nearest(member, _index(path, name))}"
                )
            return path, member
        path = folder / os.path.expanduser(name)
        if path.is_file():
            return path, ""
        archives = [folder] if folder.suffix == ".tar" else sorted(folder.glob("*.tar"))
        holding = [archive for archive in archives if name in _index(archive, name)]
        if len(holding) > 1:
            raise UserError(
                f"image {name}: both {holding[0]} and {holding[1]} have it; write {holding[0].name}::{name}"
            )
        if not holding:
            tars = f", and no tar file of {folder} has it" if archives else ""
            raise UserError(f"image {name}: no such file as {path}{tars}")
        return holding[0], name


def _index(path: Path, name: str) -> Mapping[str, tuple[int, int]]:
    """Return (position, size) of each member of a tar file."""
    try:
        status = path.stat()
        return _read_index(path, status.st_size, status.st_mtime_ns)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"image {name}: {path} cannot be read as a tar file ({error})") from None


@functools.lru_cache(maxsize=64)
def _read_index(path: Path, size: int, changed: int) -> dict[str, tuple[int, int]]:
    with tarfile.open(path, "r:") as archive:
        members = [member for member in archive if member.isfile()]
    return {member.name.removeprefix("./"): (member.offset_data, member.size) for member in members}


def _member(path: Path, member: str) -> bytes:
    position, size = _index(path, member)[member]
    with open(path, "rb") as file:
        file.seek(position)
        return file.read(size)
