"""Small pictures: thumbnails of images, and several images in one file."""

import io
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw

SIDE = 256  # pixels of a thumbnail's longer side, at most
_COLUMNS, _GAP, _CAPTION = 4, 8, 18  # images in a row; pixels between them, and of a line of text


def thumbnail(pixels: np.ndarray, side: int = SIDE) -> PIL.Image.Image:
    """Return an image reduced such that no side is longer than `side` pixels; small images keep their size.

    Args:
      pixels: `[H, W, 3]` uint8.
      side: in pixels.
    """
    image = PIL.Image.fromarray(pixels)
    image.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    return image


def png(image: PIL.Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def contact_sheet(pictures: Sequence[tuple[np.ndarray, str]]) -> bytes:
    """Draw images in a grid, each below its caption, and return the PNG file.

    Args:
      pictures: pairs of pixels `[H, W, 3]` uint8 and caption.
    """
    columns = min(_COLUMNS, len(pictures))
    cell = SIDE + _GAP, SIDE + _CAPTION + _GAP
    rows = -(-len(pictures) // columns)
    sheet = PIL.Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for index, (pixels, caption) in enumerate(pictures):
        x, y = _GAP + index % columns * cell[0], _GAP + index // columns * cell[1]
        shown = "".join(c if c.isprintable() else " " for c in caption)
        while shown and draw.textlength(shown) > SIDE:
            shown = shown[:-1]
        draw.text((x, y), shown, fill="black")
        image = thumbnail(pixels)
        draw.rectangle(
            (x, y + _CAPTION, x + image.width + 1, y + _CAPTION + image.height + 1), outline="grey"
        )
        sheet.paste(image, (x + 1, y + _CAPTION + 1))
    return png(sheet)
