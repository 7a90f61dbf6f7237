"""Preprocessing of images, against transformers' processor for Pillow."""

import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from picture_cases import CASES, STRETCHED, encoded

from lpo_jax.errors import UserError
from lpo_jax.images import ImageProcessor, to_rgb

PROCESSORS = {
    "qwen2_5_vl": ImageProcessor(max_pixels=28 * 28 * 300),
    "qwen3_vl": ImageProcessor(
        patch_size=16, min_pixels=128 * 128, max_pixels=400 * 400, mean=(0.5,) * 3, std=(0.5,) * 3
    ),
}


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden" / "images.npz")


@pytest.mark.parametrize("name", PROCESSORS)
def test_patches_equal_transformers(name, golden):
    processor = PROCESSORS[name]
    assert len(CASES) >= 50
    for i, (grid, total, index, expected) in enumerate(
        zip(*(golden[f"{name}_{key}"] for key in ("grids", "sums", "indices", "values")))
    ):
        patches, found = processor(encoded(i))
        assert found == tuple(grid), CASES[i]
        assert patches.shape == (np.prod(grid), processor.patch_values)
        np.testing.assert_array_equal(patches.ravel()[index], expected, err_msg=str(CASES[i]))
        np.testing.assert_allclose(patches.sum(dtype=np.float64), total, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_grids_are_computed_from_the_size(processor):
    unit = processor.patch_size * processor.merge_size
    for i in range(len(CASES)):
        height, width, _ = to_rgb(encoded(i)).shape
        rows, columns = processor.grid(height, width)
        assert processor(encoded(i))[1] == (rows, columns)
        assert processor.num_tokens((rows, columns)) * unit**2 == rows * columns * processor.patch_size**2
        assert rows * columns * processor.patch_size**2 <= processor.max_pixels


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_processors_are_restored_from_their_file(processor, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_json()))
    assert ImageProcessor.from_directory(tmp_path) == processor
    (tmp_path / "preprocessor_config.json").unlink()
    nested = json.dumps({"processor_class": "Qwen3VLProcessor", "image_processor": processor.to_json()})
    (tmp_path / "processor_config.json").write_text(nested)
    assert ImageProcessor.from_directory(tmp_path) == processor


def test_published_files_are_read():
    v4 = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "image_mean": [0.48, 0.45, 0.4]}
    assert ImageProcessor.from_json(v4).max_pixels == 12845056
    v5 = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "image_std": [0.5] * 3,
    }
    assert ImageProcessor.from_json(v5).min_pixels == 65536


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resample": 2}, "resample"),
        ({"do_resize": False}, "do_resize"),
        ({"patch_size": "14"}, "patch_size"),
        ({"min_pixels": 100, "max_pixels": 10}, "min_pixels"),
        ({"image_mean": [0.5]}, "image_mean"),
    ],
)
def test_other_processors_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ImageProcessor.from_json(values)


def test_a_missing_processor_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_directory(tmp_path)


def _gif() -> bytes:
    file = io.BytesIO()
    frames = [PIL.Image.new("L", (8, 8), level) for level in (0, 200)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"no image", r"row 3: not an image"),
        (encoded(20)[:-60], "row 3: cannot be decoded"),
        (_gif(), "2 frames"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8 \[H, W, 3\]"),
        (np.zeros((4, 4, 3), np.float32), r"uint8 \[H, W, 3\]"),
        (PIL.Image.new("RGB", STRETCHED), "200 times"),
    ],
)
def test_bad_images_are_refused(image, message):
    with pytest.raises(UserError, match=message):
        ImageProcessor()(image, "row 3")


def test_sixteen_bit_images_keep_their_grey_levels():
    levels = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    file = io.BytesIO()
    PIL.Image.fromarray(levels).save(file, "PNG")
    np.testing.assert_array_equal(to_rgb(file.getvalue())[..., 0], levels >> 8)
