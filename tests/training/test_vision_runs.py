"""Whole runs on prompts with images: resumes, records, adapters of the tower, and what is refused."""

import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from tiny import run_values, vision_tokenizer

from lpo_jax import load_model
from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.inspection.load import read_run, read_samples
from lpo_jax.inspection.page import render
from lpo_jax.reporting import is_timing, read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.training.loop import train

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
MICRO = Path(__file__).parents[2] / "configs" / "micro_vision"

pytestmark = pytest.mark.usefixtures("no_plots")

TASK = """
import io
import numpy as np
import PIL.Image
from lpo_jax.rewards import Verdict

def picture(n):
    file = io.BytesIO()
    size = (60, 40) if n % 2 else (40, 60)  # other grids of as many patches, so that all share a program
    level = np.full((*size, 3), 17 * n % 256, np.uint8)
    PIL.Image.fromarray(level).save(file, "PNG")
    return file.getvalue()

def dataset(split):
    first, count = {"train": (0, 12), "heldout": (100, 4)}[split]
    return [{"n": n, "answer": "7", "images": [picture(n)]} for n in range(first, first + count)]

def prompt(row):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "say " + "x" * (row["n"] % 5)}]}]

def solution(row):
    return row["answer"]

def verify(response, row):
    digits = sum(c.isdigit() for c in response) / max(len(response), 1)
    return Verdict(digits, "pass" if digits >= 0.5 else "wrong", {"answer": response[:1]})
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    shutil.copytree(GOLDEN / "qwen3_vl", folder / "model")
    vision_tokenizer().save_pretrained(folder / "model")
    (folder / "task.py").write_text(TASK)
    return folder


def values(files, output, **model):
    config = run_values(output, files / "model", files / "task.py")
    config["sampling"]["max_prompt_tokens"] = 48
    config["training"] |= {"token_budget": 128}
    config["model"] |= model
    return config


def learned(output):
    rows = [{k: v for k, v in row.items() if not is_timing(k)} for row in read_metrics(output)]
    rollouts = {path.name: path.read_text() for path in (Path(output) / "rollouts").iterdir()}
    return load_run(output, "latest")[0].params, [row for row in rows if len(row) > 1], rollouts


@pytest.mark.parametrize(
    ("freeze", "ahead"),
    [
        pytest.param(True, 0, id="frozen", marks=pytest.mark.slow),
        pytest.param(False, 0, id="trained", marks=pytest.mark.slow),
        pytest.param(True, 1, id="ahead", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_same_and_keeps_its_images(files, freeze, ahead, tmp_path, one_layout):
    def config_of(name, steps):
        config = values(files, tmp_path / name, vision={"freeze": freeze})
        config["sampling"] |= {"ahead": 1, "max_tokens": 24, "max_rows": 6} if ahead else {}
        config["training"]["steps"] = steps
        config["evaluation"] |= {"every": 0, "problems": 4}
        config["optimizer"]["schedule"] = "constant"
        return config

    train(parse_config(config_of("whole", 2)))
    train(parse_config(config_of("parts", 1)))
    train(parse_config(config_of("parts", 2)), resume=True)
    whole, parts = (learned(tmp_path / name) for name in ("whole", "parts"))
    chex.assert_trees_all_equal(whole[0]["vision"], parts[0]["vision"])
    chex.assert_trees_all_equal(whole[0], parts[0])
    assert whole[2] == parts[2]
    start = load_model(files / "model").params
    moved = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - y).max()), whole[0], start)
    assert min(jax.tree.leaves(moved["layers"])) > 0
    assert (max(jax.tree.leaves(moved["vision"])) > 0) == (not freeze)
    steps = [row for row in whole[1] if "training/rollout_probs_diff_max" in row]
    assert ahead or (steps and max(row["training/rollout_probs_diff_max"] for row in steps) < 1e-3)
    assert max(row.get("lpo/staleness_max", 0) for row in whole[1]) == ahead
    for name in ("whole", "parts"):
        images, shown = images_of(tmp_path / name)
        assert len(images) == 8 + 4  # eight training prompts in two steps, four held-out ones
        assert len(shown) == 8  # those of the rollouts


def images_of(output):
    """Return the names of the images of a run, which are those of its folder, and those that its report shows."""
    run = read_run(output)
    rows = [
        row for file in (*run.rollouts.values(), *run.evaluations.values()) for row in read_samples(file)[0]
    ]
    names = {image["name"] for row in rows for image in row["images"]}
    assert names == {file.stem for file in (run.path / "images").iterdir()}
    assert all("<|vision_start|><|image_pad|><|vision_end|>" in row["input"] for row in rows)
    html = render([run])
    return names, {name for name in names if f'"{name}":"data:image/png;base64,' in html}


@pytest.mark.slow
def test_a_random_model_with_a_warm_start_keeps_its_images(tmp_path):
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
    images, shown = images_of(tmp_path / "run")
    assert len(images) == 4 + 2  # four training prompts in two steps, two held-out ones
    assert len(shown) == 4  # those of the rollouts


@pytest.mark.slow
def test_adapters_of_the_tower_are_warm_started_trained_and_merged_for_export(files, tmp_path, one_layout):
    config = values(files, tmp_path / "run", lora={"rank": 2, "targets": ["wq", "v_qkv"]})
    config["training"] |= {"steps": 1, "updates_per_step": 1}
    config["warm_start"] = {"steps": 1, "batch_size": 4}
    config["evaluation"] |= {"every": 0, "problems": 4}
    train(parse_config(config))
    (row,) = read_metrics(tmp_path / "run" / "warm_start")
    assert row["train/grad_norm"] > 0
    trained, _ = load_run(tmp_path / "run", "latest")
    start = load_model(files / "model").params
    for old, new in ((start, trained.params), (start["vision"], trained.params["vision"])):
        changed = {name for name, x in old["layers"].items() if not np.array_equal(x, new["layers"][name])}
        assert changed == ({"wq"} if old is start else {"v_qkv"})
    trained.save(tmp_path / "hf")
    chex.assert_trees_all_equal(load_model(tmp_path / "hf").params, trained.params)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            "model",
            {"vision": {"freeze": False}, "lora": {"rank": 2}},
            "with model.lora all weights are frozen",
        ),
        ("model", {"init": "random"}, "set model.vision.freeze=false"),
        ("sampling", {"max_prompt_tokens": 8}, "has .* tokens, more than sampling.max_prompt_tokens"),
        ("objective", {"name": "ghpo"}, "not supported for rows with images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(section, changes, message, files, tmp_path):
    config = values(files, tmp_path / "run")
    config[section] = config.get(section, {}) | changes
    with pytest.raises(UserError, match=message):
        train(parse_config(config))


def test_a_text_model_refuses_rows_with_images(files, tmp_path):
    config = values(files, tmp_path / "run")
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "model")
    vision_tokenizer().save_pretrained(tmp_path / "model")
    config["model"]["path"] = str(tmp_path / "model")
    with pytest.raises(UserError, match="reads text only"):
        train(parse_config(config))
    config["model"] |= {"vision": {"freeze": False}}
    with pytest.raises(UserError, match="reads text only; remove it"):
        train(parse_config(config))
