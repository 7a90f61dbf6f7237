"""Prompts with images as token ids, and what the records say of them."""

import copy
import dataclasses
import io
from pathlib import Path

import PIL.Image
import pytest

from lpo_jax import tasks
from lpo_jax.errors import UserError
from lpo_jax.models.load import load_config_and_tokenizer
from lpo_jax.rollout.collect import within_limit
from lpo_jax.rollout.encode import count_image_tokens, encode_hinted, encode_prompt, prompt_text
from lpo_jax.tasks.images import EncodedImage
from lpo_jax.tasks.task import Task, as_chat

MICRO = Path(__file__).parents[2] / "configs" / "micro_vision"
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' "
    "else part.text }}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_config_and_tokenizer(MICRO)[1]


@pytest.fixture(scope="module")
def wide(tokenizer):
    """The tokenizer with a processor that lets images have 4 to 64 tokens."""
    processor = dataclasses.replace(tokenizer.vision.processor, min_pixels=32 * 32, max_pixels=128 * 128)
    vision = dataclasses.replace(tokenizer.vision, processor=processor)
    return dataclasses.replace(tokenizer, vision=vision)


def with_template(tokenizer):
    """The tokenizer with a chat template in the manner of Qwen2.5-VL."""
    own = copy.copy(tokenizer.tokenizer)
    own.chat_template = TEMPLATE
    return dataclasses.replace(tokenizer, tokenizer=own)


def image(width: int, height: int) -> EncodedImage:
    file = io.BytesIO()
    PIL.Image.new("L", (width, height), 99).save(file, "PNG")
    return EncodedImage(file.getvalue(), "x.png")


def asked(prompt: str, *images: EncodedImage) -> tuple[Task, dict]:
    row = {"images": list(images)}
    return Task(
        "made", [row], [], lambda row: prompt, tasks.get("shapes", train_size=1, heldout_size=1).verifier
    ), row


def test_placeholders_expand_to_the_tokens_of_each_image(wide):
    task, row = asked("<image>Which angle?\n<image><answer>", image(32, 64), image(64, 48))
    ids = encode_prompt(task, wide, row)
    start, end, pad = 3, 4, 5
    expected = [start, *[pad] * 8, end, 10, start, *[pad] * 12, end, 11]
    assert ids == expected
    assert [count_image_tokens(wide, x) for x in row["images"]] == [8, 12]
    look = "<|vision_start|><|image_pad|><|vision_end|>"
    assert prompt_text(wide, ids) == f"{look}Which angle?\n{look}<answer>"
    # The same from messages, by the chat template.
    chat = with_template(wide)
    assert encode_prompt(as_chat(task), chat, row) == expected


def test_hints_are_refused(wide):
    task, row = asked("<image>Which angle?\n<answer>", image(32, 32))
    with pytest.raises(UserError, match="hints are not supported for rows with images"):
        encode_hinted(task, wide, row, "30")


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ("Which angle?\n", 1, "0 image placeholders for 1 image"),
        ("<image><image>Which angle?\n", 1, "2 image placeholders for 1 image"),
        ("<image><|image_pad|>Which angle?\n", 1, "2 image placeholders for 1 image"),
        ("<|image_pad|>Which angle?\n", 0, "1 image placeholder for 0 images"),
        ("<|video_pad|>Which angle?\n", 0, "video"),
    ],
)
def test_more_or_fewer_placeholders_than_images(wide, prompt, images, message):
    task, row = asked(prompt, *[image(32, 32)] * images)
    with pytest.raises(UserError, match=message) as error:
        encode_prompt(task, wide, row)
    assert "\n" not in str(error.value)


def test_images_count_against_the_prompt_limit(wide):
    task, row = asked("<image>Which angle?\n<answer>", image(128, 128))
    small = {"images": [image(32, 32)]}
    assert len(encode_prompt(task, wide, row)) == 68
    kept, dropped, _ = within_limit(task, wide, [row, small], 67, True, "training data")
    assert (kept, dropped) == ([small], 1)
    message = "training data row 0: its prompt has 68 tokens, more than sampling.max_prompt_tokens = 67"
    with pytest.raises(UserError, match=message):
        within_limit(task, wide, [row, small], 67, False, "training data")
    stretched = {"images": [image(1000, 3)]}
    with pytest.raises(UserError, match=r"held-out data row 0: image x.png: 1000 x 3 pixels"):
        within_limit(task, wide, [stretched], 67, True, "held-out data")


def test_the_micro_model_has_tokens_for_the_task_shapes(tokenizer):
    task = tasks.get("shapes", train_size=60, heldout_size=4)
    for row in task.train:
        ids = encode_prompt(task, tokenizer, row) + tokenizer.encode(task.solution(row))
        assert len(ids) == 16 + 2 + 4 and tokenizer.unk_token_id not in ids
