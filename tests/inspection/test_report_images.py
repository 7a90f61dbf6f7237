"""Images of prompts in the terminal and in the report, by the references of the rollout files."""

import base64
import json
import shutil

import numpy as np
import pytest
from browser import Page, chromium

from lpo_jax.commands.main import main
from lpo_jax.inspection.images import embedded_thumbnails, image_references
from lpo_jax.inspection.load import read_run, read_samples
from lpo_jax.inspection.page import render, save_report
from lpo_jax.reporting.pictures import png, thumbnail
from lpo_jax.reporting.writers import RunWriter
from lpo_jax.tasks.images import EncodedImage


def image(n: int) -> EncodedImage:
    pixels = np.full((300, 600, 3), 20 * n, np.uint8)
    pixels[n : n + 40] = 255
    return EncodedImage(png(thumbnail(pixels, 600)), f"train/<b>{n}.png")


@pytest.fixture
def run(own_run):
    """A run whose prompts have an image each, but for the prompts with an odd id."""
    for file in (own_run / "rollouts").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            if row["id"] % 2 == 0:
                row["images"] = [image(row["id"]).reference()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with RunWriter(own_run) as writer:
        writer.write_images(image(n) for n in (0, 2, 4, 6, 2))
    return own_run


def test_thumbnails_are_small_and_written_once(run):
    files = sorted((run / "images").iterdir())
    assert {file.stem for file in files} == {image(n).name for n in (0, 2, 4, 6)}
    before = files[0].stat().st_mtime_ns
    with RunWriter(run) as writer:
        writer.write_images([image(n) for n in (0, 2, 4, 6)])
    assert files[0].stat().st_mtime_ns == before
    assert EncodedImage(files[0].read_bytes(), "").size == (128, 256)


def test_references(run):
    row = next(row for row in read_samples(run / "rollouts" / "1.jsonl")[0] if row["id"] % 2 == 0)
    ((name, caption),) = image_references(row)
    assert name == image(row["id"]).name and caption == f"train/<b>{row['id']}.png, 600 x 300"
    assert image_references({}) == image_references({"images": "x"}) == []
    for damaged in ("../../etc/passwd", None, "A" * 16, name + "\n"):
        assert image_references({"images": [{"name": damaged}]}) == []


def test_show(run, capsys):
    row = next(row for row in read_samples(run / "rollouts" / "2.jsonl")[0] if row["id"] % 2 == 0)
    assert main(["show", str(run), "--step", "2", "--prompt", str(row["id"])]) == 0
    out = capsys.readouterr().out
    assert f"train/<b>{row['id']}.png, 600 x 300" in out and f"{image(row['id']).name}.png" in out.replace(
        "\n", ""
    )
    assert main(["show", str(run), "--best", "50"]) == 0
    assert f"image train/<b>{row['id']}.png, 600 x 300" in capsys.readouterr().out


def test_thumbnails_of_the_report_stay_within_the_budget(run):
    found, names = read_run(run), [image(n).name for n in (0, 2, 4, 6)]
    everything, notes = embedded_thumbnails(found, names, 10**6)
    assert list(everything) == names and not notes
    first = everything[names[0]]
    data = base64.b64decode(first.removeprefix("data:image/png;base64,"))
    assert data == (run / "images" / f"{names[0]}.png").read_bytes()
    some, notes = embedded_thumbnails(found, names, len(first))
    assert list(some) == names[:1] and notes == [
        "own: 3 of 4 thumbnails of images do not fit into this file."
    ]
    (run / "images" / f"{names[1]}.png").write_bytes(b"<svg onload=alert(1)>")
    (run / "images" / f"{names[2]}.png").unlink()
    some, notes = embedded_thumbnails(found, names, 10**6)
    assert list(some) == [names[0], names[3]] and notes == [
        "own: 2 thumbnails of images are missing in images/."
    ]


def test_a_report_without_its_thumbnails_says_so(run):
    shutil.rmtree(run / "images")
    assert "thumbnails of images are missing in images/" in render([read_run(run)])


def test_the_report_in_a_browser(run, tmp_path):
    with chromium() as browser:
        page = Page(browser)
        rows = read_samples(run / "rollouts" / "1.jsonl")[0]
        seen, blind = (next(row["id"] for row in rows if row["id"] % 2 == odd) for odd in (0, 1))
        page.open(save_report([run], tmp_path / "report.html"), f"#group/0/1/{seen}")
        page.tab.wait_for_selector(".pictures img")
        assert page.texts(".pictures figcaption") == [f"train/<b>{seen}.png, 600 x 300"]
        shown = page.tab.evaluate(
            "(i => [i.complete, i.naturalWidth, i.naturalHeight])(document.querySelector('.pictures img'))"
        )
        assert shown == [True, 256, 128]
        page.go(f"prompt/0/{seen}", ".pictures img")
        page.go(f"group/0/1/{blind}", ".response")
        assert page.tab.locator(".pictures").count() == 0
        page.go(f"prompt/0/{blind}", ".response")
        assert page.tab.locator(".pictures").count() == 0 and "null" not in page.texts("#detail")[0]
        page.tab.close()
        assert not page.problems
