"""Regenerate tests/models/golden/qwen2_5_vl/ and qwen3_vl/: tiny random vision models, saved and run by transformers.

Requires torch (`pip install -e .[oracle]`). Takes a few seconds:

    python scripts/make_golden_vision.py

Each directory holds the files of `save_pretrained`, a `preprocessor_config.json`, and `logits.npz`: tokens [B, T], mask
[B, T] (rows are padded on the left), logits [B, T, V] in float32, and the images [H, W, 3] uint8 as `image_0`, ...;
`rows` gives the row of each image. Norms and biases are random too, so that a test fails if one is ignored.

With `--check DIRECTORY GOLDEN` the script runs a directory that lpo_jax has exported on the tokens and images of a
golden directory, and prints the largest difference from its logits.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

GOLDEN = Path(__file__).parents[1] / "tests" / "models" / "golden"
TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
)
TOWER = dict(depth=4, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=32)
TOKENS = dict(vision_start_token_id=60, vision_end_token_id=61, image_token_id=62, video_token_id=63)
PIXELS = dict(min_pixels=1024, max_pixels=70000)
# name: (config, settings of the image processor)
MODELS = {
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLConfig(
            text_config=TEXT
            | {"rope_parameters": dict(rope_type="default", rope_theta=100.0, mrope_section=[1, 1, 2])},
            vision_config=TOWER | dict(patch_size=14, window_size=56, fullatt_block_indexes=[1, 3]),
            **TOKENS,
        ),
        dict(patch_size=14),
    ),
    "qwen3_vl": (
        transformers.Qwen3VLConfig(
            text_config=TEXT
            | {
                "head_dim": 16,
                "rope_parameters": dict(
                    rope_type="default", rope_theta=100.0, mrope_section=[4, 2, 2], mrope_interleaved=True
                ),
            },
            vision_config=TOWER
            | dict(patch_size=16, num_position_embeddings=36, deepstack_visual_indexes=[0, 2]),
            tie_word_embeddings=True,
            **TOKENS,
        ),
        dict(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    ),
}
# Height and width of the images in each row, and the tokens of text around them.
ROWS = [([(56, 84)], 9), ([(33, 200), (150, 61)], 14), ([], 20), ([(240, 240)], 3)]


def images_of(rng: np.random.Generator) -> list[list[np.ndarray]]:
    """Blocks of random colours."""

    def draw(height: int, width: int) -> np.ndarray:
        blocks = rng.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), np.uint8)
        return blocks.repeat(20, 0).repeat(20, 1)[:height, :width]

    return [[draw(*size) for size in sizes] for sizes, _ in ROWS]


def inputs(rng: np.random.Generator, images: list[list[np.ndarray]], processor, merge: int = 2):
    """Token ids and mask, left-padded, and transformers' arrays of the images."""
    rows, patches, grids = [], [], []
    for row, (_, length) in zip(images, ROWS):
        text = rng.integers(3, 60, length).tolist()
        ids = text[:2]
        for image in row:
            out = processor(image, return_tensors="np")
            patches.append(out["pixel_values"])
            grids.append(out["image_grid_thw"][0])
            ids += [60, *[62] * int(np.prod(grids[-1]) // merge**2), 61]
        rows.append(ids + text[2:])
    T = max(map(len, rows))
    tokens = np.array([[0] * (T - len(row)) + row for row in rows], np.int32)
    mask = np.array([[False] * (T - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask, np.concatenate(patches), np.array(grids)


def logits(model, tokens, mask, patches, grids) -> np.ndarray:
    with torch.no_grad():
        return model(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask).long(),
            pixel_values=torch.tensor(patches),
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=torch.tensor(tokens == TOKENS["image_token_id"]).int(),
        ).logits.numpy()


def make(name: str, out: Path) -> None:
    config, settings = MODELS[name]
    torch.manual_seed(sorted(MODELS).index(name))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            center = 1.0 if ("norm" in key and not key.endswith("bias")) or "ln_q" in key else 0.0
            p.copy_(center + (0.03 if "patch_embed" in key else 0.25) * torch.randn(p.shape))
    rng = np.random.default_rng(0)
    images = images_of(rng)
    processor = Qwen2VLImageProcessorPil(**settings, **PIXELS)
    tokens, mask, patches, grids = inputs(rng, images, processor)
    found = logits(model, tokens, mask, patches, grids)
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    processor.save_pretrained(out)
    flat = [(row, image) for row, of_row in enumerate(images) for image in of_row]
    np.savez_compressed(
        out / "logits.npz",
        tokens=tokens,
        mask=mask,
        logits=found,
        rows=np.array([row for row, _ in flat]),
        **{f"image_{i}": image for i, (_, image) in enumerate(flat)},
    )
    print(
        f"{out}: {tokens.shape} tokens, grids {grids[:, 1:].tolist()}, files {sorted(p.name for p in out.iterdir())}"
    )


def check(exported: Path, golden: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    processor = Qwen2VLImageProcessorPil.from_pretrained(exported)
    rng = np.random.default_rng(0)
    data = np.load(golden / "logits.npz")
    tokens, mask, patches, grids = inputs(rng, images_of(rng), processor)
    assert np.array_equal(tokens, data["tokens"])
    difference = np.abs(logits(model, tokens, mask, patches, grids) - data["logits"])[data["mask"]].max()
    print(json.dumps({"exported": str(exported), "largest difference of logits": float(difference)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=GOLDEN, help="directory of the golden files")
    parser.add_argument(
        "--check", type=Path, nargs=2, metavar=("DIRECTORY", "GOLDEN"), help="compare an export"
    )
    parser.add_argument("names", nargs="*", default=list(MODELS), help="models to regenerate; default: both")
    args = parser.parse_args()
    if args.check:
        check(*args.check)
    else:
        for name in args.names:
            make(name, args.out / name)
        print(f"made with transformers {transformers.__version__}, torch {torch.__version__}")
