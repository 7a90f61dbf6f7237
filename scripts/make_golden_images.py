"""Regenerate tests/golden/images.npz: images preprocessed by transformers' processor for Pillow.

Requires torch (`pip install -e .[oracle]`). Takes a few seconds:

    python scripts/make_golden_images.py

The file holds, for each case of tests/picture_cases.py and each of two processors, the grid `[n, 2]`, the sum of all
values `[n]`, and 300 values at random places `[n, 300]` with their flat indices.
"""

import io
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import transformers
from transformers.image_utils import load_image

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
from picture_cases import CASES, STRETCHED, encoded  # noqa: E402

PROCESSORS = {
    "qwen2_5_vl": dict(patch_size=14, min_pixels=56 * 56, max_pixels=28 * 28 * 300),
    "qwen3_vl": dict(
        patch_size=16,
        size={"shortest_edge": 128 * 128, "longest_edge": 400 * 400},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ),
}


def main() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    arrays = {}
    for name, settings in PROCESSORS.items():
        processor = Qwen2VLImageProcessorPil(**settings)
        grids, sums, indices, values = [], [], [], []
        for i in range(len(CASES)):
            # `load_image` applies the EXIF orientation, but converts to RGB without regard to transparency.
            image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(encoded(i))))
            assert image.size == load_image(PIL.Image.open(io.BytesIO(encoded(i)))).size
            out = processor(image, return_tensors="np")
            flat = out["pixel_values"].ravel()
            at = np.random.default_rng(i).integers(0, flat.size, 300)
            grids.append(out["image_grid_thw"][0, 1:])
            sums.append(flat.sum(dtype=np.float64))
            indices.append(at)
            values.append(flat[at])
        arrays |= {f"{name}_grids": np.array(grids), f"{name}_sums": np.array(sums)}
        arrays |= {f"{name}_indices": np.array(indices, np.int32), f"{name}_values": np.array(values)}
        try:
            processor(PIL.Image.new("RGB", STRETCHED))
        except ValueError as error:
            assert "aspect ratio" in str(error)
        else:
            raise AssertionError("transformers refuses images of this shape no longer")
    path = TESTS / "golden" / "images.npz"
    np.savez_compressed(path, **arrays)
    print(
        f"{path}: {len(CASES)} images, made with transformers {transformers.__version__}, Pillow {PIL.__version__}"
    )


if __name__ == "__main__":
    main()
