"""Plans of vision models: the tower's parameters, memory and work, against its compiled programs."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tiny import vision_tokenizer

from lpo_jax.commands.main import main
from lpo_jax.config import load_config, parse_config
from lpo_jax.images import Patches
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import abstract_params
from lpo_jax.models.load import load_config_and_tokenizer
from lpo_jax.models.prompt_images import abstract_images, expand, lay_out
from lpo_jax.planner import plan as plans
from lpo_jax.planner import roofline, topology
from lpo_jax.planner.cost import program_cost
from lpo_jax.planner.hlo import parse_hlo
from lpo_jax.planner.programs import Slice
from lpo_jax.planner.sizes import TRAINED_PASSES, Sizes, TowerWork
from lpo_jax.sampling.rows import image_outputs
from lpo_jax.training.check import check_config

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "models" / "golden"
LARGE = ROOT / "configs" / "models" / "qwen2.5-vl-3b"


def read(folder) -> ModelConfig:
    return load_config_and_tokenizer(folder)[0]


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def model(request):
    return read(GOLDEN / request.param)


def work_of(model, **changes):
    sizes = dict(P=4, K=2, S=20, T=8, updates=2, itemsize=4, reference=False, scorings=1, image_tokens=16)
    return roofline.Workload(model, **{**sizes, **changes})


def test_parameters_of_the_tower_are_counted_apart(model):
    sizes, params = Sizes.of(model), abstract_params(model)
    assert sizes.tower == sum(leaf.size for leaf in jax.tree.leaves(params["vision"])) > 0
    assert sizes.total == sum(leaf.size for leaf in jax.tree.leaves(params))
    # Tokens run through the decoder's matrices only.
    text = dataclasses.replace(model, family="qwen3", vision=None)
    assert sizes.layers == Sizes.of(text).layers


@pytest.mark.parametrize(("tokens", "rows"), [(16, 4), (21, 5)])
def test_abstract_images_have_the_shapes_of_real_ones(model, tokens, rows):
    vision, m, p = model.vision, model.vision.processor.merge_size, model.vision.processor.patch_size
    image = Patches(np.zeros((rows * 4 * m * m, 3, p, p), np.uint8), (rows * m, 4 * m))
    ids = np.array([expand(vision, [3, vision.image_token, 4, 5], [image.grid])] * 3)
    real = lay_out(model, ids, ids > 0, [[image]] * 3, 2)
    made = abstract_images(model, 3, ids.shape[1], tokens, 2)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(made) == shapes(real)


def test_work_of_the_tower_is_that_of_its_program(model):
    """The compiled program runs padded rows, and counts attention to the whole image for every layer."""
    full = dataclasses.replace(model, vision=dataclasses.replace(model.vision, window=0, full_layers=()))
    images = abstract_images(full, 4, 20, 16, 1)
    program = image_outputs.lower(full, abstract_params(full), images.rows, np.dtype(np.float32)).compile()
    counted = program_cost(parse_hlo(program.as_text())).flops
    assert counted == pytest.approx(4 * TowerWork.of(full, 16).flops, rel=0.02)


def test_windows_save_attention():
    model = read(GOLDEN / "qwen2_5_vl")
    vision, patches = model.vision, 64 * 4
    full = dataclasses.replace(model, vision=dataclasses.replace(vision, window=0, full_layers=()))
    saved = TowerWork.of(full, 64).flops - TowerWork.of(model, 64).flops
    layers = vision.depth - len(vision.full_layers)
    assert saved == 4 * vision.width * layers * (patches - vision.window_patches) * patches > 0


def test_a_frozen_tower_has_no_optimizer():
    model = read(GOLDEN / "qwen3_vl")
    sizes, alone = Sizes.of(model), roofline.Setting(plans.meshes.MeshSizes(1, 1, 1), 100, False, rows=8)
    trained, frozen = (roofline.standing(work_of(model, frozen_tower=n), alone) for n in (0, 2))
    assert trained["frozen weights"] == 0 and frozen["frozen weights"] == 2 * sizes.tower
    assert trained["optimizer"] - frozen["optimizer"] == 8 * sizes.tower
    assert trained["sampler's weights"] == frozen["sampler's weights"] == 4 * sizes.total
    phases = lambda n: {p.name: p for p in roofline.estimate_phases(work_of(model, frozen_tower=n), alone)}  # noqa: E731
    tower = 2 * TowerWork.of(model, 16).flops
    assert phases(0)["update"].flops - phases(2)["update"].flops == pytest.approx(4 * tower)
    text = {p.name: p for p in roofline.estimate_phases(work_of(model, image_tokens=0), alone)}
    assert "vision" not in text
    assert phases(2)["score"].flops - text["score"].flops == pytest.approx(tower)
    assert phases(2)["vision"].flops == pytest.approx(2 * tower)  # the whole round at once
    assert phases(2)["decode"].held - text["decode"].held == pytest.approx(
        4 * 4 * 16 * 3 * model.width - (4 * 3 - 2) * sizes.tower
    )


@pytest.mark.parametrize(
    ("section", "products"),
    [
        ({}, 1),
        ({"vision": {"freeze": False}}, 3),
        ({"lora": {"rank": 2}}, 1),
        ({"lora": {"rank": 2, "targets": ["all", "v_qkv"]}}, 2),
    ],
    ids=["frozen", "trained", "beside adapters", "adapted"],
)
def test_the_tower_has_a_backward_pass_where_it_is_trained(section, products, run_config):
    config = parse_config(run_config(model={"path": "model"} | section))
    work = roofline.workload(config, read(GOLDEN / "qwen3_vl"), frozenset(), False)
    assert work.tower_products == products


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
def test_programs_with_images_compile_for_devices(freeze, run_config):
    """The planner's programs, for two devices of this machine."""
    model = read(GOLDEN / "qwen3_vl")
    config = parse_config(
        run_config(
            model={"path": "model", "vision": {"freeze": freeze}},
            sampling={"num_responses": 2, "max_tokens": 8, "max_prompt_tokens": 16},
            training={"prompts_per_step": 4, "updates_per_step": 2, "token_budget": 72, "remat": False},
            mesh={"devices": 2},
        )
    )
    objective = check_config(config)
    work = roofline.workload(config, model, objective.needs, False)
    assert work.image_tokens == 16
    target = topology.parse_topology("v5e:1x2")
    setting = plans.setting_of(config, work, target)
    made = Slice(config, model, (1,), objective, work, setting, jax.devices()[:2], target)
    estimates = {phase.name: phase for phase in roofline.estimate_phases(work, setting)}
    names = ["vision", "prefill", "update"] if freeze else ["update"]
    for name in names:
        phase = made.phase(name)
        assert phase.held == pytest.approx(estimates[name].held, rel=0.1), name
    text = dataclasses.replace(work, image_tokens=0)
    without = dataclasses.replace(made, work=text).phase("update")
    # Each device has one prompt of a minibatch. Here the compiler unrolls loops and keeps what would be recomputed.
    passes = (phase.flops - without.flops) / TowerWork.of(model, 16).flops
    assert passes == pytest.approx(1, rel=0.03) if freeze else 3 <= passes <= TRAINED_PASSES


def test_the_plan_of_a_vision_model_names_the_tower(run_config, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        (model / file).write_text((GOLDEN / "qwen3_vl" / file).read_text())
    vision_tokenizer().save_pretrained(model)
    values = run_config(model={"path": str(model)}, sampling={"max_prompt_tokens": 16})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["plan", str(tmp_path / "run.yaml"), "--topology", "h100:1", "--estimate", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    names = [phase["name"] for phase in made["asked"]["phases"]]
    assert names == ["layout", "vision", "prefill", "decode", "score", "update"]
    assert made["asked"]["standing"]["frozen weights"] > 0
    arguments = ["plan", str(tmp_path / "run.yaml"), "--topology", "h100:1", "--estimate"]
    assert main([*arguments, "--lengths", "mean=3,sigma=1"]) == 0
    text = capsys.readouterr().out
    assert "of which an image takes up to 16" in " ".join(text.split())


def test_geometry_fits_on_one_h100():
    config = load_config(
        ROOT / "configs" / "geometry_3b_vl.yaml",
        [f"--model.path={LARGE}"],
    )
    target = topology.parse_topology("h100:1")
    made = plans.plan(config, target, read(LARGE), (1,), check_config(config), estimate=True)
    assert made.work.image_tokens == 1024
    assert made.suggested is not None and made.spare(made.suggested) > 0
