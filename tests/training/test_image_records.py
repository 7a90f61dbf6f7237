"""A run on prompts with images leaves references and thumbnails, which the report shows."""

from pathlib import Path

from lpo_jax.config import parse_config
from lpo_jax.inspection.load import read_run, read_samples
from lpo_jax.inspection.page import render
from lpo_jax.training.loop import train

MICRO = Path(__file__).parents[2] / "configs" / "micro_vision"


def test_a_run_keeps_its_images(tmp_path, no_plots):
    values = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(MICRO), "init": "random", "vision": {"freeze": False}},
        "task": {"name": "shapes", "train_size": 8, "heldout_size": 2},
        "sampling": {"num_responses": 2, "max_tokens": 3, "max_prompt_tokens": 20},
        "training": {"steps": 2, "prompts_per_step": 2, "updates_per_step": 1, "remat": False},
        "warm_start": {"steps": 1, "batch_size": 2},
        "evaluation": {"every": 0},
        "rewards": {"workers": 1},
        "mesh": {"devices": 1},
    }
    train(parse_config(values))
    run = read_run(tmp_path / "run")
    files = [*run.rollouts.values(), *run.evaluations.values()]
    rows = [row for file in files for row in read_samples(file)[0]]
    names = {image["name"] for row in rows for image in row["images"]}
    assert len(names) == 4 + 2  # four training prompts in two steps, two held-out ones
    assert names == {file.stem for file in (run.path / "images").iterdir()}
    assert all(row["input"].startswith("<|vision_start|><|image_pad|><|vision_end|>") for row in rows)
    html = render([run])
    shown = {name for name in names if f'"{name}":"data:image/png;base64,' in html}
    assert len(shown) == 4  # those of the rollouts
