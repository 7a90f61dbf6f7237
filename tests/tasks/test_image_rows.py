"""Rows with images: where images come from, how they are kept, and images that are refused."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml

from lpo_jax import tasks
from lpo_jax.commands.main import main
from lpo_jax.errors import UserError
from lpo_jax.tasks.images import EncodedImage, ImageReader, row_images, without_images

READER = ImageReader(["images"])
JSONL = {"prompt": "<image>{question}", "verifier": "math", "images": "images"}


def picture(shade: int = 200, size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("L", size, shade).save(file, form)
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def rows(count: int, image=lambda n: f"{n}.png") -> list[dict]:
    return [{"question": f"{n} + 1?", "answer": str(n + 1), "images": image(n)} for n in range(count)]


def test_paths_tar_members_and_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jpg").write_bytes(picture(2, form="JPEG"))
    tar(tmp_path / "c.tar", {"x/c.png": picture(3), "./d.png": picture(4)})
    found = [
        {"images": "a.png"},
        {"images": ["sub/b.jpg", str(tmp_path / "a.png")]},
        {"images": ["x/c.png", "c.tar::d.png"]},
        {"images": [{"bytes": picture(5), "path": "e.png"}, {"bytes": None, "path": "a.png"}, picture(6)]},
        {"images": []},
        {"images": None},
    ]
    shades = [[int(image.pixels()[0, 0, 0]) for image in READER.read(row, tmp_path)] for row in found]
    assert shades == [[1], [2, 1], [3, 4], [5, 1, 6], [], []]
    assert [Path(path).name for row in found for path in READER.files(row, tmp_path)] == [
        *("a.png", "b.jpg", "a.png", "c.tar", "c.tar", "a.png")
    ]
    image = READER.read(found[2], tmp_path)[0]
    assert image.source == f"{tmp_path}/c.tar::x/c.png" and image.size == (30, 40)
    assert image.reference() == {"name": image.hash[:16], "source": image.source, "height": 30, "width": 40}
    elsewhere = ImageReader(["images"], str(tmp_path))
    assert elsewhere.read(found[0], tmp_path / "sub")[0].data == picture(1)
    assert ImageReader(["images"], str(tmp_path / "c.tar")).read({"images": "d.png"}, tmp_path)[
        0
    ].data == picture(4)


def test_transparent_images_are_flattened_on_white_and_rotated_ones_turned(tmp_path):
    clear = PIL.Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    clear.putpixel((1, 1), (0, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    flat, turned = READER.read({"images": ["clear.png", "turned.jpg"]}, tmp_path)
    assert flat.pixels()[0, 0].tolist() == [255] * 3 and flat.pixels()[1, 1].tolist() == [0] * 3
    assert turned.size == turned.pixels().shape[:2] == (40, 30)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("missing.png", r"image missing.png: no such file as .*/missing.png, and no tar file of .* has it"),
        ("c.tar::no.png", r"c.tar has no member 'no.png'"),
        ("no.tar::a.png", r"no.tar cannot be read as a tar file"),
        ("both.png", r"both .*/c.tar and .*/d.tar have it; write c.tar::both.png"),
        ("empty.png", r"empty.png: the file is empty"),
        ("text.png", r"text.png: not an image that can be decoded"),
        ("cut.png", r"cut.png: cannot be decoded"),
        ("film.mp4", r"film.mp4: videos are not supported"),
        ({"bytes": b"\0\0\0\x18ftypmp42", "path": "film.MOV"}, r"film.MOV: videos are not supported"),
        (3, r"image '3': expected a path, bytes"),
        ("", r"expected a path, bytes"),
        ({"bytes": None, "path": None}, r"expected a path, bytes"),
    ],
)
def test_refused_images(tmp_path, value, message):
    tar(tmp_path / "c.tar", {"both.png": picture()})
    tar(tmp_path / "d.tar", {"both.png": picture()})
    files = {"empty.png": b"", "text.png": b"no image", "cut.png": picture(size=(99, 99))[:60]}
    for name, data in {**files, "film.mp4": b"\0\0\0\x18ftypmp42"}.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        READER.read({"images": value}, tmp_path)
    assert "\n" not in str(error.value)


def test_missing_fields_and_videos_are_refused(tmp_path):
    with pytest.raises(UserError, match="no field 'images' with images; did you mean 'image'"):
        READER.read({"image": "a.png"}, tmp_path)
    with pytest.raises(UserError, match="the row has videos, which are not supported"):
        READER.read({"images": [], "videos": ["a.mp4"]}, tmp_path)


def test_a_file_of_rows(write, tmp_path):
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    task = tasks.get("jsonl", path=write("a.jsonl", rows(6)), **JSONL)
    row = task.train[0]
    (image,) = row_images(row)
    assert image.pixels()[0, 0, 0] == int(row["answer"]) - 1
    assert task.prompt(row) == f"<image>{row['question']}" and "images" not in without_images(row)
    chat = tasks.get("jsonl", path=write("a.jsonl", rows(6)), chat=True, **JSONL)
    asked = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    assert chat.prompt(row) == [{"role": "user", "content": asked}]

    # The hash covers the images, and not where they lie.
    (tmp_path / "elsewhere").mkdir()
    for n in range(6):
        os.rename(tmp_path / f"{n}.png", tmp_path / "elsewhere" / f"{n}.png")
    moved = tasks.get(
        "jsonl", path=write("a.jsonl", rows(6)), image_folder=str(tmp_path / "elsewhere"), **JSONL
    )
    assert moved.content_hash == task.content_hash
    (tmp_path / "elsewhere" / "3.png").write_bytes(picture(77))
    changed = tasks.get(
        "jsonl", path=write("a.jsonl", rows(6)), image_folder=str(tmp_path / "elsewhere"), **JSONL
    )
    assert changed.content_hash != task.content_hash


def test_equal_texts_with_different_images_are_different_prompts(write, tmp_path):
    same = [{"answer": str(n), "images": {"bytes": picture(n), "path": "x"}} for n in range(10)]
    options = JSONL | {"prompt": "<image>How dark?"}
    task = tasks.get("jsonl", path=write("a.parquet", same), heldout_fraction=0.3, **options)
    assert (len(task.train), len(task.heldout)) == (7, 3)
    with pytest.warns(UserWarning, match="2 of 2 held-out prompts are also trained on"):
        tasks.get("jsonl", path=write("a.parquet", same), heldout=write("b.parquet", same[:2]), **options)


def test_a_file_whose_field_named_images_is_not_used(write):
    plain = JSONL | {"images": "", "prompt": "{question}"}
    task = tasks.get("jsonl", path=write("a.jsonl", rows(3)), **plain)
    assert row_images(task.train[0]) == [] and without_images(task.train[0]) is task.train[0]
    assert task.train[0]["images"].endswith(".png")


@pytest.mark.parametrize(("images", "marks"), [(["0.png", "0.png"], 1), ([], 1), ("0.png", 2), ("0.png", 0)])
def test_as_many_marks_as_images(write, tmp_path, images, marks):
    (tmp_path / "0.png").write_bytes(picture())
    path = write("a.jsonl", rows(1, lambda n: images))
    count = len(images) if isinstance(images, list) else 1
    with pytest.raises(
        UserError, match=rf"a.jsonl:1: the prompt has {marks} marks <image> for {count} images"
    ):
        tasks.get("jsonl", heldout=path, **JSONL | {"prompt": "<image>" * marks + "{question}"})


def test_a_damaged_image_is_named_with_its_row(write, tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(n) if n < 2 else b"no image")
    with pytest.raises(UserError, match=r"a.jsonl:3: image .*2.png: not an image"):
        tasks.get("jsonl", path=write("a.jsonl", rows(3)), **JSONL)
    with pytest.raises(UserError, match=r"a.jsonl:3: image .*2.png: not an image"):
        tasks.get("geometry3k", path=write("a.jsonl", rows(3)))


# Geometry3k


HUB = [
    {
        "images": [{"bytes": picture(n), "path": f"images/{n}.png"}],
        "problem": "<image>Find $x$." if n % 2 else f"<image>Find {n}.",
        "answer": f"{n} \\sqrt {{ 2 }}",
    }
    for n in range(1, 9)
]


def test_geometry3k_of_the_hub(write):
    task = tasks.get(
        "geometry3k", path=write("a.parquet", HUB), heldout=write("b.parquet", HUB[:2]), chat=True
    )
    assert (len(task.train), len(task.heldout)) == (6, 2)
    row = task.train[0]
    assert row["problem"] == "Find $x$." and row["answer"] == "3 \\sqrt { 2 }" == task.gold(row)
    assert np.all(row["images"][0].pixels() == 3) and row["images"][0].source == "images/3.png"
    (message,) = task.prompt(row)
    image, text = message["content"]
    assert image == {"type": "image"}
    assert text["text"] == (
        "Find $x$. You FIRST think about the reasoning process as an internal monologue and then provide the final "
        "answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in "
        "\\boxed{}."
    )
    verdict = task.verifier.load()("<think>So.</think> \\boxed{3\\sqrt2}", without_images(row))
    assert (verdict.outcome, verdict.reward) == ("pass", 1.0)
    # Read again from the disk: still encoded, byte for byte.
    again = tasks.get(
        "geometry3k", path=write("a.parquet", HUB), heldout=write("b.parquet", HUB[:2]), chat=True
    )
    assert again.content_hash == task.content_hash
    assert [r["images"][0].data for r in again.train] == [r["images"][0]["bytes"] for r in HUB[2:]]


def test_geometry3k_with_letters_and_a_tar_file(write, tmp_path):
    choices = ["5", "14", "\\sqrt { 15 }", "35"]
    stored = [
        {"problem_text": f"Find {n}.", "choices": choices, "answer": letter, "image": f"train/{n}.png"}
        for n, letter in enumerate("ABCDX")
    ]
    tar(tmp_path / "train_images.tar", {f"train/{n}.png": picture(n) for n in range(5)})
    task = tasks.get("geometry3k", heldout=write("train.jsonl", stored[:4]))
    assert [row["answer"] for row in task.heldout] == choices and task.heldout[0]["choices"] == choices
    assert task.prompt(task.heldout[1]).startswith("<image>Find 1. You FIRST think")
    # Another image in the tar file: the rows are prepared again.
    tar(tmp_path / "train_images.tar", {f"train/{n}.png": picture(n + 100) for n in range(5)})
    other = tasks.get("geometry3k", heldout=write("train.jsonl", stored[:4]))
    assert other.heldout[0]["images"][0].pixels()[0, 0, 0] == 100 and other.content_hash != task.content_hash
    stored[4]["answer"] = "E"
    with pytest.warns(UserWarning, match="1 of 5 rows .* the answer is E, but there are 4 choices"):
        assert len(tasks.get("geometry3k", heldout=write("train.jsonl", stored)).heldout) == 4


def test_a_tfds_builder_with_images(write):
    """The folder that geometry3k has written is read by the task tfds."""
    import tensorflow_datasets as tfds

    task = tasks.get("geometry3k", heldout=write("a.parquet", HUB))
    folder = next(
        path.parent
        for path in Path(os.environ["LPO_CACHE"]).glob("tasks/*/*/dataset_info.json")
        if len(source := tfds.builder_from_directory(path.parent).as_data_source("train")) == 8
        and "images" in source[0]
    )
    options = {"path": str(folder), "train": "train[:6]", "heldout": "train[6:]", "verifier": "math"}
    again = tasks.get("tfds", prompt="<image>{problem}", images="images", **options)
    assert [row["images"][0].data for row in again.heldout] == [
        row["images"][0].data for row in list(task.heldout)[6:]
    ]


def test_lpo_data_counts_and_draws_the_images(write, tmp_path, capsys):
    stored = [
        {**row, "images": {"bytes": picture(n, (40 + n, 30)), "path": "x"}} for n, row in enumerate(rows(8))
    ]
    options = [f"--task.{name}={value}" for name, value in JSONL.items()]
    sheet = tmp_path / "sheet.png"
    path = write("a.parquet", stored)
    arguments = ["data", "jsonl", f"--task.path={path}", *options, "--task.heldout_fraction=0.25", "--json"]
    assert main([*arguments, f"--images={sheet}"]) == 0
    summary = json.loads(capsys.readouterr().out)
    sizes = sorted(width for row in stored for width in EncodedImage(row["images"]["bytes"], "").size[1:])
    assert (summary["train"]["images"], summary["heldout"]["images"]) == (6, 2)
    assert {summary[split]["smallest_image"] for split in ("train", "heldout")} > {f"{sizes[0]} x 30"}
    assert summary["row"]["images"][0]["height"] == 30 and "<image>" in summary["prompt"]
    drawn = np.asarray(PIL.Image.open(sheet).convert("L"))
    assert {1, 2} & set(np.unique(drawn)) and drawn.shape[1] > 4 * 256
    assert main([*arguments[:-1]]) == 0
    assert re.search(r"largest image +\d\d x 30 +\d\d x 30", capsys.readouterr().out)
    assert main(["data", "arithmetic", f"--images={sheet}"]) == 2
    assert "the rows of task arithmetic have no images" in capsys.readouterr().err


def test_a_text_model_refuses_rows_with_images(write, tmp_path, capsys, run_config):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    task = {"name": "jsonl", "path": write("a.jsonl", rows(4)), **JSONL}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_config(task=task)))
    for command in ("data", "train"):
        assert main([command, str(tmp_path / "config.yaml")]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert "row 0: the prompt has images, but the model reads text only" in error[-1] and len(error) == 1


def test_a_users_own_task_with_images(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(7))
    file = tmp_path / "task.py"
    file.write_text(
        "def dataset(split):\n"
        "    data = open(__file__.replace('task.py', 'a.png'), 'rb').read()\n"
        "    images = [[data], ['a.png']]\n"
        "    return [{'prompt': f'<image>{split} {n}', 'images': images[n], 'answer': n} for n in (0, 1)]\n"
        "def verify(response, row): return float('images' not in row and response == str(row['answer']))\n"
    )
    task = tasks.get("python", file=str(file), chat=True)
    assert [row["images"][0].data for row in task.train] == [picture(7)] * 2
    assert task.prompt(task.train[1])[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "train 1"},
    ]
    file.write_text(file.read_text().replace("'a.png']", "'b.png']"))
    with pytest.raises(UserError, match=r"dataset\('train'\), row 1: image b.png: no such file"):
        tasks.get("python", file=str(file))
