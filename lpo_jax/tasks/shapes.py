"""The task shapes: generated questions whose answer is only in the picture, for small vision-language models.

| question | picture | answer |
| --- | --- | --- |
| dots | equal dots, spread over the picture | their number, 1 to 9 |
| corners | a filled polygon | its number of corners, 3 to 6 |
| longest | four horizontal segments | the place of the longest one, counted from the top |
| angle | two rays from a point | the angle in degrees, anticlockwise from the ray to the right: 30, 60, ..., 330 |
"""

import functools
import io
import math
import random
from collections.abc import Callable, Mapping, Sequence

from lpo_jax.errors import UserError, nearest
from lpo_jax.rewards import VerifierSpec
from lpo_jax.tasks.generate import train_and_heldout
from lpo_jax.tasks.images import MARK, EncodedImage
from lpo_jax.tasks.task import Task, with_prefill
from lpo_jax.types import Json

PREFILL = "<answer>"
TEXTS = {
    "dots": "How many dots?",
    "corners": "How many corners?",
    "longest": "Which segment is the longest?",
    "angle": "Which angle?",
}

_UNIT = 1000  # coordinates are whole numbers, thousandths of the side
_RADIUS = 80  # of a dot
_FINE = 4  # pictures are drawn larger by this factor and reduced, which smooths their edges


def shapes_task(
    *,
    questions: Sequence[str] = ("dots", "corners", "longest", "angle"),
    side: int = 64,
    blank: bool = False,
    train_size: int = 2000,
    heldout_size: int = 256,
    seed: int = 0,
) -> Task:
    """Generate the task: rows `{"question": "corners", "points": [...], "answer": 5, "images": [...]}`.

    Args:
      questions: the kinds of questions to draw from, some of those in the module's docstring.
      side: height and width of the pictures in pixels.
      blank: whether to leave all pictures white, as a control: nothing but the frequencies of the answers can be
        learned then. Questions and answers stay the same.
      train_size, heldout_size: number of rows. No picture occurs twice, within a split or across.
      seed: seed of the problems.

    Raises:
      UserError: if an option has an invalid value.
    """
    known = isinstance(questions, list | tuple) and all(question in _DRAWS for question in questions)
    if not known or not questions or len(set(questions)) < len(questions):
        unknown = (
            next((q for q in questions if q not in _DRAWS), "") if isinstance(questions, list | tuple) else ""
        )
        raise UserError(
            f"task shapes: questions {questions!r}{nearest(str(unknown), _DRAWS)}: need a list of different ones of "
            f"{', '.join(_DRAWS)}"
        )
    if not 16 <= side <= 1024:
        raise UserError(f"task shapes: side {side}: need 16 to 1024 pixels")
    train, heldout = train_and_heldout(
        functools.partial(_draw, list(questions), side),
        lambda row: (row["question"], row["images"][0].hash),
        name="shapes",
        train_size=train_size,
        heldout_size=heldout_size,
        seed=seed,
    )
    if blank:
        for row in (*train, *heldout):
            row["images"] = [EncodedImage(_picture("blank", [], side), "blank")]
    return Task(
        "shapes",
        train,
        heldout,
        prompt=lambda row: with_prefill(f"{MARK}{TEXTS[row['question']]}\n", PREFILL),
        verifier=VerifierSpec("arithmetic", prefill=PREFILL),
        solution=lambda row: f"{row['answer']}</answer>",
    )


def _draw(questions: list[str], side: int, rng: random.Random) -> dict[str, Json]:
    question = questions[rng.randrange(len(questions))]
    points, answer = _DRAWS[question](rng)
    image = EncodedImage(_picture(question, points, side), question)
    return {"question": question, "points": points, "answer": answer, "images": [image]}


def _dots(rng: random.Random) -> tuple[list[list[int]], int]:
    """Draw dots in different cells of a grid of 4 x 4, off their middles, so that they do not touch."""
    cells = rng.sample(range(16), 1 + rng.randrange(9))
    shift = lambda: rng.randrange(61) - 30  # noqa: E731
    return [[140 + 240 * (c % 4) + shift(), 140 + 240 * (c // 4) + shift()] for c in cells], len(cells)


def _corners(rng: random.Random) -> tuple[list[list[int]], int]:
    """Draw a convex polygon: corners on a circle, at least 40 degrees apart."""
    count, start = 3 + rng.randrange(4), rng.randrange(360)
    shift = min(20, (360 // count - 40) // 2)
    angles = [start + 360 * i // count + rng.randrange(2 * shift + 1) - shift for i in range(count)]
    radius, x, y = 300 + rng.randrange(120), 450 + rng.randrange(100), 450 + rng.randrange(100)
    return [_at(x, y, radius, angle) for angle in angles], count


def _longest(rng: random.Random) -> tuple[list[list[int]], int]:
    """Draw four segments, as pairs of points; the longest is longer than the others by a tenth of the side."""
    most, place = 400 + rng.randrange(450), rng.randrange(4)
    lengths = [most if i == place else 150 + rng.randrange(most - 250) for i in range(4)]
    starts = [60 + rng.randrange(900 - length) for length in lengths]
    ends = zip(starts, lengths, (140, 380, 620, 860))
    return [point for x, length, y in ends for point in ([x, y], [x + length, y])], place + 1


def _angle(rng: random.Random) -> tuple[list[list[int]], int]:
    """Draw two rays: the vertex, the end of the ray to the right, and the end of the other."""
    angle = 30 * (1 + rng.randrange(11))
    x, y, radius = 450 + rng.randrange(100), 450 + rng.randrange(100), 300 + rng.randrange(120)
    return [[x, y], _at(x, y, 400, 0), _at(x, y, radius, angle)], angle


_DRAWS: Mapping[str, Callable[[random.Random], tuple[list[list[int]], int]]] = {
    "dots": _dots,
    "corners": _corners,
    "longest": _longest,
    "angle": _angle,
}


def _at(x: int, y: int, radius: int, degrees: int) -> list[int]:
    turn = math.radians(degrees)
    return [x + round(radius * math.cos(turn)), y - round(radius * math.sin(turn))]


def _picture(kind: str, corners: list[list[int]], side: int) -> bytes:
    """Draw the picture of a question, or a blank one, as a PNG file."""
    import PIL.Image
    import PIL.ImageDraw

    large = side * _FINE
    image = PIL.Image.new("RGB", (large, large), "white")
    draw = PIL.ImageDraw.Draw(image)
    points = [(x * large / _UNIT, y * large / _UNIT) for x, y in corners]
    width, radius = large // 20, _RADIUS * large / _UNIT
    if kind == "dots":
        for x, y in points:
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill="black")
    elif kind == "corners":
        draw.polygon(points, fill="black")
    elif kind == "longest":
        for start, end in zip(points[::2], points[1::2]):
            draw.line([start, end], fill="black", width=width)
    elif kind == "angle":
        draw.line([points[0], points[1]], fill="red", width=width)
        draw.line([points[0], points[2]], fill="black", width=width)
    file = io.BytesIO()
    image.resize((side, side), PIL.Image.Resampling.BOX).save(file, "PNG")
    return file.getvalue()
