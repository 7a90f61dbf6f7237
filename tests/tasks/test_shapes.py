"""The task shapes: questions whose answer is only in the picture."""

import math

import numpy as np
import pytest

from lpo_jax import tasks
from lpo_jax.errors import UserError
from lpo_jax.tasks.images import row_images, without_images


def darkness(row):
    """How dark each pixel is, 0 to 255, `[H, W]`; a red one is dark too."""
    (image,) = row_images(row)
    return 255 - image.pixels()[..., 1].astype(int)


@pytest.fixture(scope="module")
def rows():
    task = tasks.get("shapes", train_size=420, heldout_size=60)
    return [*task.train, *task.heldout]


def test_pictures_show_the_answer(rows):
    for row in rows:
        dark = darkness(row)
        assert dark.shape == (64, 64)
        if row["question"] == "longest":
            middles = [round(64 * y) for y in (0.14, 0.38, 0.62, 0.86)]
            assert np.argmax([dark[y].sum() for y in middles]) + 1 == row["answer"]
        elif row["question"] == "dots":
            # None touches another: each takes the same area. Pillow's edges belong to the dot.
            area = math.pi * (64 * 80 / 1000 + 1 / 8) ** 2
            assert abs(dark.sum() / 255 / area - row["answer"]) < 0.1
        elif row["question"] == "angle":
            # The dark pixels of the other ray are, on average, in its direction.
            (image,) = row_images(row)
            black = 255 - image.pixels()[..., 0].astype(int)
            y, x = (np.average(axis, weights=black) for axis in np.mgrid[:64, :64])
            at_x, at_y = (64 * z / 1000 for z in row["points"][0])
            angle = math.degrees(math.atan2(at_y - y, x - at_x)) % 360
            assert abs(angle - row["answer"]) < 12
        else:
            assert len(row["points"]) == row["answer"] and dark.sum() > 255 * 100


def test_answers_are_spread_and_only_in_the_picture(rows):
    prompt = tasks.get("shapes", train_size=1, heldout_size=1).prompt
    for question, answers in (
        ("dots", set(range(1, 10))),
        ("corners", {3, 4, 5, 6}),
        ("longest", {1, 2, 3, 4}),
        ("angle", set(range(30, 331, 30))),
    ):
        of = [row for row in rows if row["question"] == question]
        assert {row["answer"] for row in of} == answers and len(of) > 80
        assert len({prompt(row) for row in of}) == 1
        most = max(sum(row["answer"] == answer for row in of) for answer in answers)
        assert most / len(of) < (0.45 if len(answers) == 4 else 0.25)
    assert len({row["images"][0].hash for row in rows}) == len(rows)


def test_solutions_pass_and_seeds_repeat():
    task = tasks.get("shapes", train_size=20, heldout_size=5, questions=["corners"], side=28)
    verify = task.verifier.load()
    assert all(verify(task.solution(row), without_images(row)).outcome == "pass" for row in task.train)
    assert task.prompt(task.train[0]) == "<image>How many corners?\n<answer>"
    assert task.train[0]["images"][0].size == (28, 28)
    again = tasks.get("shapes", train_size=30, heldout_size=5, questions=["corners"], side=28)
    assert tasks.content_hash(again.train[:20]) == tasks.content_hash(task.train)
    other = tasks.get("shapes", train_size=20, heldout_size=5, questions=["corners"], side=28, seed=1)
    assert other.content_hash != task.content_hash


def test_blank_pictures_are_a_control():
    shown, blank = (
        tasks.get("shapes", train_size=30, heldout_size=5, blank=blank) for blank in (False, True)
    )
    assert [(row["question"], row["answer"]) for row in shown.train] == [
        (row["question"], row["answer"]) for row in blank.train
    ]
    assert len({row["images"][0].hash for row in blank.train}) == 1
    assert all((darkness(row) == 0).all() for row in blank.train)
    assert blank.content_hash != shown.content_hash


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": ["corner"]}, "did you mean 'corners'"),
        ({"questions": []}, "need a list of different ones of dots, corners, longest, angle"),
        ({"questions": "corners"}, "need a list"),
        ({"side": 8}, "side 8: need 16 to 1024 pixels"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        tasks.get("shapes", **options)
