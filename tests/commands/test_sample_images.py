"""`lpo sample` with images."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tiny import vision_tokenizer

from lpo_jax import load_model
from lpo_jax.commands.main import main

GOLDEN = Path(__file__).parents[1] / "models" / "golden"


@pytest.fixture
def files(tmp_path):
    model = shutil.copytree(GOLDEN / "qwen3_vl", tmp_path / "model")
    vision_tokenizer().save_pretrained(model)
    for name, level in (("a.png", 40), ("b.png", 200)):
        PIL.Image.fromarray(np.full((60, 90, 3), level, np.uint8)).save(tmp_path / name)
    return tmp_path


def sampled(capsys, *arguments):
    assert main(["sample", *map(str, arguments), "--max-tokens=5", "-n=2", "--json"]) == 0
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def test_images_are_in_front_of_the_text_or_at_its_marks(files, capsys):
    model, a, b = files / "model", f"--image={files}/a.png", f"--image={files}/b.png"
    pictures = [(files / name).read_bytes() for name in ("a.png", "b.png")]
    settings = {"images": [pictures], "num_responses": 2, "max_tokens": 5}
    look = "<|vision_start|><|image_pad|><|vision_end|>"

    def generated(prompt):
        return load_model(model).generate([prompt], **settings).texts[0]

    plain = sampled(capsys, model, "say", a, b)
    assert plain == generated(look * 2 + "say")
    assert sampled(capsys, model, "say<image> or <image>x", a, b) == generated(f"say{look} or {look}x")
    parts = [{"type": "image"}] * 2 + [{"type": "text", "text": "say"}]
    assert sampled(capsys, model, "say", a, b, "--chat") == generated([{"role": "user", "content": parts}])
    assert plain != sampled(capsys, model, "say", b, a)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["say", "--image=absent.png"], "--image absent.png: cannot be read (No such file"),
        (["say", "--image={model}/config.json"], "image 0: not an image"),
        (["<image> <image>x", "--image={a}"], "2 image placeholders for 1 image"),
    ],
)
def test_mistakes_end_in_one_line(files, capsys, arguments, message):
    known = {"model": files / "model", "a": files / "a.png"}
    assert main(["sample", str(files / "model"), *(x.format(**known) for x in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_text_model_refuses_images(files, capsys):
    model = shutil.copytree(GOLDEN / "qwen3", files / "text")
    vision_tokenizer().save_pretrained(model)
    assert main(["sample", str(model), "say", f"--image={files}/a.png"]) == 2
    assert "reads text only; take a vision model" in capsys.readouterr().err
