"""Training on prompts with images: exact gradients, and whole runs."""

import dataclasses
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import run_values, vision_tokenizer

from lpo_jax import load_model
from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.models import decoder, lora
from lpo_jax.models.lora import Frozen
from lpo_jax.models.prompt_images import expand, lay_out
from lpo_jax.models.runner import Groups, ModelRunner, picture_array, score
from lpo_jax.objectives import TokenStats
from lpo_jax.parallel.mesh import MeshSizes, build_mesh
from lpo_jax.planner.cost import program_cost
from lpo_jax.planner.hlo import parse_hlo
from lpo_jax.reporting import is_timing, read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.training.loop import train

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
SIZES = [[(60, 90)], [(30, 150), (99, 61)], [], [(120, 100)]]
P, K, T = 4, 3, 5

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def case(request):
    """A model, groups of ragged prompts with no, one and two images, their mask, and coefficients."""
    model = load_model(GOLDEN / request.param)
    rng, vision = np.random.default_rng(1), model.config.vision
    cut, rows = [], []
    for sizes in SIZES:
        cut.append([vision.processor.patches(rng.integers(0, 256, (*s, 3), np.uint8)) for s in sizes])
        ids = [*rng.integers(3, 60, 3), *[60, vision.image_token, 61] * len(sizes), *rng.integers(3, 60, 2)]
        rows.append(expand(vision, ids, [image.grid for image in cut[-1]]))
    lengths = np.array([len(row) for row in rows], np.int32)
    prompts = np.zeros((P, lengths.max()), np.int32)
    for prompt, row in zip(prompts, rows):
        prompt[: len(row)] = row
    responses = rng.integers(3, 60, (P, K, T)).astype(np.int32)
    mask = np.arange(T) < rng.integers(2, T + 1, (P, K, 1))
    weight = np.where(mask, rng.normal(size=(P, K, T)), 0).astype(np.float32)
    groups = Groups(prompts, lengths, responses, pictures=picture_array(cut))
    return model, groups, mask, weight


def plain_log_probs(config, params, groups):
    """Log-probs `[P, K, T]` of every response in a row of its own, without anything shared or packed."""
    S, vision = groups.prompts.shape[1], config.vision
    tokens = np.zeros((P * K, S + T), np.int32)
    mask = np.zeros((P * K, S + T), bool)
    for row in range(P * K):
        p, k = divmod(row, K)
        length = groups.lengths[p]
        tokens[row, : length + T] = [*groups.prompts[p, :length], *groups.responses[p, k]]
        mask[row, : length + T] = True
    images = lay_out(config, tokens, mask, [groups.pictures[row // K] for row in range(P * K)])
    logits = decoder.logits(config, params, tokens, mask, images)
    never = jnp.isin(jnp.arange(config.vocab_size), jnp.array([vision.image_token, vision.video_token]))
    logp = jax.nn.log_softmax(jnp.where(never, -1e30, logits))
    at = np.repeat(groups.lengths, K)[:, None] - 1 + np.arange(T)
    logp = jnp.take_along_axis(logp, at[..., None], axis=1)
    return jnp.take_along_axis(logp, groups.responses.reshape(P * K, T, 1), axis=-1).reshape(P, K, T)


@pytest.fixture(scope="module")
def plain(case):
    """The log-probs and the gradient of plain autodiff."""
    model, groups, _, weight = case

    @jax.jit
    def loss(params):
        logp = plain_log_probs(model.config, params, groups)
        return (logp * weight).sum(), logp

    gradient, logp = jax.grad(loss, has_aux=True)(model.params)
    return np.asarray(logp), gradient


def assert_close(found, expected, bound=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected)):
        scale = max(float(np.linalg.norm(y)), 1e-2)
        np.testing.assert_array_less(
            np.linalg.norm(np.asarray(x) - np.asarray(y)) / scale, bound, err_msg=str(path)
        )


# Whole groups in one row, and groups split into single responses.
@pytest.mark.parametrize("budget", [1000, 60], ids=["whole", "split"])
def test_gradient_by_parts_equals_autodiff(case, plain, budget):
    model, groups, mask, weight = case
    logp, gradient = plain
    runner = ModelRunner(model.config, token_budget=budget)
    packed = runner.pack(groups, mask)
    assert (len(packed.layout.token) > 1) == (budget == 60)
    np.testing.assert_allclose(
        np.where(mask, score(runner, model.params, packed).logp, 0), np.where(mask, logp, 0), atol=3e-5
    )
    pull_back = jax.jit(lambda params, frozen: runner.pull_back(params, packed, TokenStats(weight), frozen))
    trained, stats = pull_back(model.params, None)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(trained["vision"])) > 0.1
    assert_close(trained, gradient)
    np.testing.assert_allclose(np.where(mask, stats.logp, 0), np.where(mask, logp, 0), atol=3e-5)

    own = {name: x for name, x in model.params.items() if name != "vision"}
    alone, _ = pull_back(own, Frozen({"vision": model.params["vision"]}, None))
    assert_close(alone, {name: x for name, x in gradient.items() if name != "vision"})


def test_the_tower_runs_once_for_a_group(case):
    """In the compiled update: its products do not become more with more responses, splits or microbatches."""
    model, groups, mask, weight = case
    fixed = Frozen({"vision": model.params["vision"]}, None)
    own = {name: x for name, x in model.params.items() if name != "vision"}

    def program(num_responses, budget):
        K = num_responses
        some = dataclasses.replace(groups, responses=groups.responses[:, :K])
        runner = ModelRunner(model.config, token_budget=budget)
        packed = runner.pack(some, mask[:, :K])

        def compiled(packed):
            run = jax.jit(
                lambda params, tower: runner.pull_back(params, packed, TokenStats(weight[:, :K]), tower)
            )
            return run.lower(own, fixed).compile().as_text()

        text = compiled(packed)
        products = [line for line in text.splitlines() if " dot(" in line and "vision" in line]
        without = compiled(packed.replace(images=packed.images.replace(rows=None)))
        flops = program_cost(parse_hlo(text)).flops - program_cost(parse_hlo(without)).flops
        return len(packed.layout.token), len(products), flops

    (one, products, flops), (many, again, same) = program(1, 1000), program(3, 60)
    assert one == 1 < many
    assert products == again > 10
    assert flops == same > 0


def test_kernels_see_the_same_images(case):
    """Prompts and responses through the kernels for TPUs, in their interpreter."""
    model, groups, mask, _ = case
    found = [
        np.where(mask, score(runner, model.params, runner.pack(groups, mask)).logp, 0)
        for runner in (ModelRunner(model.config, attention=name) for name in ("interpret", "plain"))
    ]
    np.testing.assert_allclose(*found, atol=1e-4)


def test_a_batch_without_images_leaves_the_tower(case):
    model, groups, mask, weight = case
    runner = ModelRunner(model.config, token_budget=200)
    text = dataclasses.replace(groups, pictures=None, prompts=np.minimum(groups.prompts, 59))
    gradient, _ = runner.pull_back(model.params, runner.pack(text, mask), TokenStats(weight))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradient["vision"]))


def test_adapters_of_the_decoder_see_images(case):
    model, groups, mask, weight = case
    adapters = lora.Lora(2, 4.0)
    trained = lora.init(model.config, adapters, jax.random.key(0))
    runner = ModelRunner(model.config, token_budget=200)
    packed = runner.pack(groups, mask)
    frozen = Frozen(model.params, adapters.scale)
    gradient, stats = jax.jit(lambda p: runner.pull_back(p, packed, TokenStats(weight), frozen))(trained)
    assert gradient.keys() == {"layers"} and np.abs(gradient["layers"]["wq"]["b"]).max() > 1e-3
    expected = score(runner, model.params, packed).logp
    np.testing.assert_allclose(np.where(mask, stats.logp, 0), np.where(mask, expected, 0), atol=3e-5)


def test_gradient_of_adapters_of_the_tower_is_autodiffs(case):
    model, groups, mask, weight = case
    inner = "v_down" if model.config.family == "qwen2_5_vl" else "v_fc2"
    adapters = lora.Lora(2, 4.0, ("wq", "v_qkv", "v_out", inner))
    adapters.check(model.config)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    trained = jax.tree.map(noise, lora.init(model.config, adapters, jax.random.key(0)))
    assert trained["vision"]["layers"].keys() == {"v_qkv", "v_out", inner}
    frozen = Frozen(model.params, adapters.scale)
    runner = ModelRunner(model.config, token_budget=200)
    packed = runner.pack(groups, mask)
    gradient, stats = jax.jit(lambda p: runner.pull_back(p, packed, TokenStats(weight), frozen))(trained)

    @jax.jit
    def loss(adapters):
        merged = lora.merge_adapters(lora.with_adapters(frozen, adapters))
        logp = plain_log_probs(model.config, merged, groups)
        return (logp * weight).sum(), logp

    expected, logp = jax.grad(loss, has_aux=True)(trained)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(expected))
    np.testing.assert_allclose(np.where(mask, stats.logp, 0), np.where(mask, logp, 0), atol=3e-5)
    assert_close(gradient, expected)


@pytest.mark.parametrize("shape", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
def test_meshes_compute_the_same_gradient(case, shape):
    model, groups, mask, weight = case
    runner = ModelRunner(model.config, token_budget=60)
    run = lambda: jax.jit(runner.pull_back)(model.params, runner.pack(groups, mask), TokenStats(weight))  # noqa: E731
    gradient, stats = jax.device_get(run())
    with jax.set_mesh(build_mesh(MeshSizes(*shape))):
        found, others = jax.device_get(run())
    np.testing.assert_allclose(np.where(mask, others.logp, 0), np.where(mask, stats.logp, 0), atol=3e-5)
    assert_close(found, gradient)


TASK = """
import io
import numpy as np
import PIL.Image
from lpo_jax.rewards import Verdict

def picture(n):
    file = io.BytesIO()
    level = np.full((40 + 9 * (n % 3), 60, 3), 17 * n % 256, np.uint8)
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
        pytest.param(True, 0, id="frozen"),
        pytest.param(False, 0, id="trained", marks=pytest.mark.slow),
        pytest.param(True, 1, id="ahead", marks=pytest.mark.slow),
    ],
)
def test_two_and_two_steps_are_four(files, freeze, ahead, tmp_path, no_plots):
    def config_of(name):
        config = values(files, tmp_path / name, vision={"freeze": freeze})
        config["sampling"] |= {"ahead": 1, "max_tokens": 24, "max_rows": 6} if ahead else {}
        return config

    config = config_of("four")
    train(parse_config(config))
    four = learned(tmp_path / "four")
    config = config_of("two")
    config["training"]["steps"] = 2
    config["optimizer"]["schedule"] = "constant"
    train(parse_config(config))
    config["training"]["steps"] = 4
    train(parse_config(config), resume=True)
    two = learned(tmp_path / "two")
    chex.assert_trees_all_equal(four[0]["vision"], two[0]["vision"])
    chex.assert_trees_all_equal(four[0], two[0])
    assert four[2] == two[2]
    start = load_model(files / "model").params
    moved = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - y).max()), four[0], start)
    assert min(jax.tree.leaves(moved["layers"])) > 0
    assert (max(jax.tree.leaves(moved["vision"])) > 0) == (not freeze)
    gaps = [
        row["training/rollout_probs_diff_max"] for row in four[1] if "training/rollout_probs_diff_max" in row
    ]
    assert ahead or (gaps and max(gaps) < 1e-3)
    assert max(row.get("lpo/staleness_max", 0) for row in four[1]) == ahead


def test_adapters_of_the_tower_are_merged_for_export(files, tmp_path, no_plots):
    config = values(files, tmp_path / "run", lora={"rank": 2, "targets": ["wq", "v_qkv"]})
    config["training"]["steps"] = 1
    train(parse_config(config))
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
