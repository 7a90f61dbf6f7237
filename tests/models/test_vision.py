"""Vision models against transformers."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

from lpo_jax import load_model
from lpo_jax.errors import UserError
from lpo_jax.models import prompt_images, vision
from lpo_jax.models.config import ModelConfig

VISION = ["qwen2_5_vl", "qwen3_vl"]


def load(folder):
    """A model, and its golden logits with the images of each row."""
    data = np.load(folder / "logits.npz")
    images = [[] for _ in data["tokens"]]
    for i, row in enumerate(data["rows"]):
        images[row].append(data[f"image_{i}"])
    return load_model(folder), data, images


@pytest.fixture(scope="module", params=VISION)
def case(request, golden):
    return load(golden / request.param)


def deviation(model, data, images):
    logits = np.asarray(model.logits(data["tokens"], data["mask"], images))
    assert logits.dtype == np.float32
    return np.abs(logits - data["logits"])[data["mask"]].max()


def test_logits_equal_transformers(case):
    np.testing.assert_array_less(deviation(*case), 1e-4)


CHANGES = {
    "qwen2_5_vl": [
        {"mrope": (2, 1, 1)},
        {"mrope_interleaved": True},
        {"window": 28},
        {"full_layers": (1,)},
        {"processor": {"mean": (0.5, 0.5, 0.5)}},
    ],
    "qwen3_vl": [
        {"mrope": (2, 3, 3)},
        {"mrope_interleaved": False},
        {"deepstack": (1, 2)},
        {"processor": {"std": (0.3, 0.5, 0.5)}},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), [(name, x) for name in VISION for x in CHANGES[name]], ids=str)
def test_golden_logits_see_every_switch(name, changes, golden):
    model, data, images = load(golden / name)
    of_vision = {key: x for key, x in changes.items() if not key.startswith("mrope")}
    if "processor" in of_vision:
        of_vision["processor"] = dataclasses.replace(model.config.vision.processor, **of_vision["processor"])
    tower = dataclasses.replace(model.config.vision, **of_vision)
    others = {key: x for key, x in changes.items() if key.startswith("mrope")}
    model.config = dataclasses.replace(model.config, vision=tower, **others)
    assert deviation(model, data, images) > 1e-3


@pytest.mark.slow
def test_golden_logits_see_every_parameter_of_the_tower(case):
    model, data, images = case
    whole = model.params
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole["vision"]):
        changed = jax.tree_util.tree_map_with_path(
            lambda at, x, path=path: jnp.roll(x, 1, -1) if at == path else x, whole["vision"]
        )
        model.params = whole | {"vision": changed}
        assert deviation(model, data, images) > 1e-4, (path, leaf.shape)
    model.params = whole


@pytest.mark.parametrize(
    "case", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl"], indirect=True
)
def test_images_packed_into_several_rows_give_the_same_outputs(case, monkeypatch):
    model, data, images = case
    cut = [[model.config.vision.processor.patches(image) for image in row] for row in images]
    arrays = model.config, data["tokens"], data["mask"], cut

    def outputs(shards):
        found = prompt_images.lay_out(*arrays, shards)
        rows = vision.tower_outputs(model.config, model.params["vision"], found.rows)
        return np.asarray(rows.at[:, found.index].get(mode="fill", fill_value=0))

    together = outputs(1)
    monkeypatch.setattr(prompt_images, "ROW_PATCHES", 200)
    apart = outputs(2)
    assert np.abs(together).max() > 0.1
    np.testing.assert_allclose(apart, together, atol=1e-5)


def test_text_alone_is_read_without_a_tower(case):
    model, data, images = case
    row = images.index([])
    with_empty = model.logits(data["tokens"][[row]], data["mask"][[row]], [[]])
    without = model.logits(data["tokens"][[row]], data["mask"][[row]])
    real = data["mask"][row]
    np.testing.assert_allclose(without[0][real], data["logits"][row][real], atol=1e-4)
    np.testing.assert_allclose(with_empty[0][real], without[0][real], atol=1e-6)


@pytest.mark.slow
def test_a_tower_without_deepstack_is_saved_and_read(golden, tmp_path):
    model, data, images = load(golden / "qwen3_vl")
    tower = dataclasses.replace(model.config.vision, deepstack=())
    model.config = dataclasses.replace(model.config, vision=tower)
    model.params = random_params(model.config)
    assert "deepstack" not in model.params["vision"]
    assert all(
        leaf.size for leaf in jax.tree.leaves(model.params)
    )  # checkpoints cannot hold arrays without elements
    model.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.config == model.config
    logits = [np.asarray(m.logits(data["tokens"], data["mask"], images)) for m in (model, again)]
    np.testing.assert_array_equal(*logits)
    assert (
        np.abs(
            logits[0] - model.logits(data["tokens"], data["mask"], [[255 - x for x in row] for row in images])
        ).max()
        > 1e-4
    )


def test_images_of_any_sizes_need_few_programs(golden):
    processor = load_model(golden / "qwen3_vl").config.vision.processor
    rng = np.random.default_rng(0)
    config = load_model(golden / "qwen3_vl").config
    shapes = set()
    for _ in range(60):
        image = np.zeros((*rng.integers(20, 250, 2), 3), np.uint8)
        cut = processor.patches(image)
        tokens = np.full((1, processor.num_tokens(cut.grid)), config.vision.image_token)
        found = prompt_images.lay_out(config, tokens, tokens > 0, [[cut]])
        shapes.add((found.rows.levels.shape, found.rows.images.unpack.shape))
    assert len(shapes) <= 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tokens, images: (tokens[:1], [images[0][:0]]),
            "row 0: has 6 image placeholders, but 0 images",
        ),
        (
            lambda tokens, images: (tokens[:1], [images[0] * 2]),
            "row 0: has 6 image placeholders, but 2 images of 12",
        ),
        (
            lambda tokens, images: (tokens[2:3], [images[0]]),
            "row 0: has 0 image placeholders, but 1 image of 6",
        ),
        (lambda tokens, images: (tokens[1:2], [images[1][::-1]]), "row 0: has"),
        (
            lambda tokens, images: (tokens[:1], [[np.zeros((4, 1000, 3), np.uint8)]]),
            "row 0: image 0: .* 200 times",
        ),
    ],
)
def test_placeholders_must_be_those_of_the_images(change, message, golden):
    model, data, images = load(golden / "qwen3_vl")
    tokens, given = change(data["tokens"], images)
    with pytest.raises(UserError, match=message):
        model.logits(tokens, tokens != 0, given)


def test_a_text_model_refuses_images(golden):
    image = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(UserError, match="reads text only"):
        load_model(golden / "qwen3").logits(np.ones((1, 4), np.int32), images=[[image]])


@pytest.mark.parametrize("keys", [(), ("rope_parameters",), ("rope_scaling", "rope_theta")], ids=str)
def test_configs_are_written_and_read(keys, case):
    """transformers v4 reads one pair of the keys of rotary embeddings, v5 the other."""
    config = case[0].config
    written = config.to_hf()
    text = written.get("text_config", written)
    for key in keys:
        del text[key]
    assert ModelConfig.from_hf(written, processor=config.vision.processor) == config


@pytest.fixture
def folder(golden, tmp_path):
    return shutil.copytree(golden / "qwen3_vl", tmp_path / "model")


def test_a_model_without_its_processor_is_refused(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json, which is missing"):
        load_model(folder)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("vision_config", {"patch_size": 14}, "patch_size = 14, but the image processor's is 16"),
        (
            "vision_config",
            {"out_hidden_size": 40},
            "out_hidden_size = 40, but hidden_size of the decoder is 32",
        ),
        ("vision_config", {"num_position_embeddings": 35}, "not a square"),
        ("vision_config", {"deepstack_visual_indexes": [2, 9]}, "must list layers"),
        ("vision_config", {"hidden_act": "relu"}, "relu"),
        ("vision_config", {"num_heads": 8}, "multiple of 4"),
        ("vision_config", {"depth": ...}, "depth is missing"),
        ("text_config", {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "mrope_section"),
        ("", {"image_token_id": None}, "image_token_id must be the id"),
        ("", {"vision_config": 3}, "vision_config is missing"),
    ],
)
def test_other_configs_are_refused(section, changes, message, folder):
    values = json.loads((folder / "config.json").read_text())
    part = values[section] if section else values
    part |= changes
    part = {key: x for key, x in part.items() if x is not ...}
    values = values | {section: part} if section else part
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        load_model(folder)
