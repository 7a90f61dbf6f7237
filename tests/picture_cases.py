"""Fifty encoded images of many sizes and modes, the same on every machine, to compare image processors on."""

import io

import numpy as np
import PIL.Image

# (width, height), mode, and the EXIF orientation.
SIZES = [
    *[(w, h) for w in (2, 7, 28, 57, 199, 640) for h in (5, 28, 61, 200, 333)],
    (1, 200), (200, 1), (2000, 10), (11, 2000), (2000, 1500), (1400, 90), (56, 56), (112, 112), (97, 131), (64, 448),
]  # fmt: skip
CASES = [(size, "RGB", 1) for size in SIZES]
CASES += [((123, 77), mode, 1) for mode in ("L", "1", "LA", "RGBA", "P", "PA", "CMYK")]
CASES += [((90, 41), "RGB", orientation) for orientation in (3, 6, 8)]
STRETCHED = (2000, 1)  # more than 200 times as wide as it is high


def encoded(index: int) -> bytes:
    """The bytes of a case: waves, so that neighbouring pixels are alike, and a hard edge."""
    (width, height), mode, orientation = CASES[index]
    rng = np.random.default_rng(index)
    x, y = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
    pace, phase = rng.integers(2, 40, (2, 4)), rng.integers(0, 256, 4)
    pixels = (x * pace[0] + y * pace[1] + phase + 90 * (x > width // 2)) % 256
    pixels = pixels.astype(np.uint8)
    if mode == "CMYK":
        image = PIL.Image.fromarray(pixels, "CMYK")
    else:
        image = PIL.Image.fromarray(pixels[..., :4] if "A" in mode else pixels[..., :3])
    if mode == "PA":  # a palette with a transparent colour
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
    elif mode in ("L", "1", "LA", "P"):
        image = image.convert(mode)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    options = {"transparency": 3} if mode == "PA" else {}
    image.save(file, "TIFF" if mode == "CMYK" else "PNG", exif=exif, **options)
    return file.getvalue()
