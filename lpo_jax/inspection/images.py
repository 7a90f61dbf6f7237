"""The images of prompts: what rollout files say about them, and their thumbnails in the run directory."""

import base64
import re
from collections.abc import Iterable
from pathlib import Path

from lpo_jax.inspection.load import Row, Run
from lpo_jax.reporting.text import sanitise
from lpo_jax.reporting.writers import IMAGE_FOLDER
from lpo_jax.types import Json

_NAME = re.compile(r"[0-9a-f]{16}")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def image_references(row: Row) -> list[tuple[str, str]]:
    """Return the name and a caption of each image of a response's prompt; damaged references are left out."""
    images = row.get("images")
    return [
        (image["name"], _caption(image))
        for image in (images if isinstance(images, list) else ())
        if isinstance(image, dict) and _NAME.fullmatch(str(image.get("name")))
    ]


def thumbnail_file(run: Run, name: str) -> Path | None:
    """Return the path of an image's thumbnail; None if the run has none."""
    path = run.path / IMAGE_FOLDER / f"{name}.png"
    return path if path.is_file() else None


def embedded_thumbnails(run: Run, names: Iterable[str], budget: int) -> tuple[dict[str, str], list[str]]:
    """Return thumbnails as data URIs by name, as many as fit into the budget.

    Args:
        run: the run.
        names: of the images, in the order in which they are wanted.
        budget: bytes that the data URIs may take.

    Returns:
        The data URIs, and sentences about thumbnails that are left out or missing.
    """
    uris: dict[str, str] = {}
    missing = over = 0
    for name in dict.fromkeys(names):
        path = thumbnail_file(run, name)
        try:
            data = path.read_bytes() if path else b""
        except OSError:
            data = b""
        if not data.startswith(_SIGNATURE):
            missing += 1
            continue
        uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        budget -= len(uri)
        if budget < 0:
            over += 1
        else:
            uris[name] = uri
    notes = []
    if missing:
        notes.append(f"{run.name}: {missing} thumbnails of images are missing in {IMAGE_FOLDER}/.")
    if over:
        notes.append(
            f"{run.name}: {over} of {len(uris) + over} thumbnails of images do not fit into this file."
        )
    return uris, notes


def _caption(image: dict[str, Json]) -> str:
    size = f", {image.get('width', '?')} x {image.get('height', '?')}"
    return sanitise(str(image.get("source", ""))[-200:] + size)
