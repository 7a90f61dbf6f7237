"""LoRA in the training step and in whole runs: only the adapters change, and exported weights are merged."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from precision import astype, norm

import lpo_jax
from lpo_jax.commands.main import main
from lpo_jax.config import OptimizerConfig, parse_config
from lpo_jax.errors import UserError
from lpo_jax.models import decoder, lora
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.lora import Frozen, Lora
from lpo_jax.models.runner import Groups, ModelRunner, score
from lpo_jax.objectives import TokenStats
from lpo_jax.reporting import read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.runs.state import TrainState
from lpo_jax.training.loop import train
from lpo_jax.training.optimizer import Optimizer, make_optimizer
from lpo_jax.training.step import update

pytestmark = pytest.mark.usefixtures("no_plots")

LORA = Lora(rank=2, alpha=4.0, targets=("wq", "wo", "w_down"))
init = jax.jit(lora.init, static_argnums=(0, 1))
P, K, S, T = 2, 2, 5, 4


@pytest.fixture(scope="module")
def batch(tiny_config):
    rng = np.random.default_rng(0)
    ids = lambda *shape: rng.integers(1, tiny_config.vocab_size, shape).astype(np.int32)  # noqa: E731
    groups = Groups(ids(P, S), np.array([2, 5], np.int32), ids(P, K, T))
    return groups, TokenStats(rng.normal(size=(P, K, T)).astype(np.float32))


def trained(config, params, batch, optimizer, steps, dtype=jnp.float32):
    """Run updates of constant coefficients in microbatches; returns the adapters' state and last statistics."""
    frozen = Frozen(jax.device_put(jax.tree.map(np.array, params)), LORA.scale)
    adapters = init(config, LORA, jax.random.key(0))
    state = TrainState(adapters, jax.jit(optimizer.init)(adapters), frozen=frozen)
    for _ in range(steps):
        runner = ModelRunner(config, token_budget=S + K * T, dtype=dtype)
        state, stats, _ = update(runner, optimizer, state, *batch)
    return state, stats


@pytest.mark.slow
def test_updates_move_the_adapters_alone(tiny_config, tiny_params, batch):
    optimizer = Optimizer(optax.adam(1e-2))
    state, _ = trained(tiny_config, tiny_params, batch, optimizer, steps=3)
    chex.assert_trees_all_equal(state.frozen.params, tiny_params)
    start = init(tiny_config, LORA, jax.random.key(0))
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.params, start)
    assert min(jax.tree.leaves(moved)) > 1e-3
    chex.assert_trees_all_equal_shapes(state.opt_state.inner_state[0].mu, start)
    before = (batch[1].logp * score(ModelRunner(tiny_config), tiny_params, batch[0]).logp).sum()
    assert (batch[1].logp * score(ModelRunner(tiny_config), state.policy, batch[0]).logp).sum() < before - 0.1


@pytest.mark.slow
def test_an_update_is_the_gradient_of_the_whole_batch(tiny_config, tiny_params, batch):
    """One step of SGD in microbatches equals autodiff of the whole batch."""
    state, _ = trained(tiny_config, tiny_params, batch, Optimizer(optax.sgd(1.0)), steps=1)
    start, (groups, coefficients) = init(tiny_config, LORA, jax.random.key(0)), batch

    def loss(adapters):
        policy = lora.merge_adapters(lora.with_adapters(state.frozen, adapters))
        return (coefficients.logp * score(ModelRunner(tiny_config), policy, groups).logp).sum()

    want = jax.jit(jax.grad(loss))(start)
    got = jax.tree.map(np.subtract, *jax.device_get((start, state.params)))
    error = norm(jax.tree.map(np.subtract, got, jax.device_get(want)))
    np.testing.assert_array_less(error / norm(want), 1e-5)


@pytest.mark.parametrize("with_adapters", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_bfloat16_keeps_what_is_trained_in_float32(tiny_config, tiny_params, batch, with_adapters):
    optimizer = Optimizer(optax.adam(1e-2))
    if with_adapters:
        base = astype(tiny_params, jnp.bfloat16)
        state, stats = trained(tiny_config, base, batch, optimizer, 1, jnp.bfloat16)
        chex.assert_trees_all_equal(state.frozen.params, base)
    else:
        params = jax.tree.map(jnp.copy, tiny_params)
        state = TrainState(params, optimizer.init(params))
        state, stats, _ = update(ModelRunner(tiny_config, dtype=jnp.bfloat16), optimizer, state, *batch)
    floats = jax.tree.leaves(
        (state.params, state.opt_state.inner_state[0].mu, state.opt_state.inner_state[0].nu, stats)
    )
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    exact = score(ModelRunner(tiny_config), tiny_params, batch[0]).logp
    gap = np.abs(np.asarray(stats.logp) - np.asarray(exact))
    assert gap.max() > 1e-4
    np.testing.assert_array_less(np.sqrt(np.square(gap).mean()), 0.15)  # the rounding of bfloat16


def config_for(run_config, output, steps):
    """The config of a GRPO run with a KL penalty to the reference, after a warm start."""
    model = run_config()["model"]["path"]
    return run_config(
        output,
        model={"path": model, "lora": {"rank": 2, "alpha": 4, "targets": ["wq", "wo", "w_down"]}},
        objective={"name": "grpo", "kl_coef": 0.1},
        training={"steps": steps, "updates_per_step": 1},
        warm_start={"steps": 2, "batch_size": 4, "learning_rate": 1e-2},
        evaluation={"every": 0, "problems": 4},
    )


@pytest.mark.slow
def test_run_learns_resumes_and_is_exported_merged(run_config, run_params, tmp_path):
    config, run = config_for(run_config, "whole", 2), tmp_path / "whole"
    train(parse_config(config))
    rows = [row for row in read_metrics(run) if "actor/kl_loss" in row]
    # The reference is the warm-started policy: the KL is 0 at the first update, and positive later.
    assert len(rows) == 2 and rows[0]["actor/kl_loss"] < 1e-6 < 1e-3 < rows[1]["actor/kl_loss"]

    for steps in (1, 2):
        train(parse_config(config_for(run_config, "parts", steps)), resume=steps == 2)
    model, step = load_run(run, "latest")
    resumed, _ = load_run(tmp_path / "parts", "latest")
    chex.assert_trees_all_equal(resumed.params, model.params)

    assert step == 2
    held = (run / "checkpoints" / "2" / "state" / "_METADATA").read_text()
    assert "w_down" in held and "w_up" not in held and "embed" not in held
    untouched = ("embed", "final_norm")
    chex.assert_trees_all_equal(
        {n: model.params[n] for n in untouched}, {n: run_params[n] for n in untouched}
    )
    chex.assert_trees_all_equal(model.params["layers"]["w_up"], run_params["layers"]["w_up"])
    assert jnp.abs(model.params["layers"]["w_down"] - run_params["layers"]["w_down"]).max() > 1e-3

    assert main(["export", str(run), str(tmp_path / "hf"), "--checkpoint", "latest"]) == 0
    exported = lpo_jax.load_model(tmp_path / "hf")
    tokens = np.array([[5, 6, 7, 8]])
    chex.assert_trees_all_equal(exported.logits(tokens), model.logits(tokens))
    assert jnp.abs(exported.logits(tokens) - decoder.logits(model.config, run_params, tokens)).max() > 1e-3


@pytest.mark.parametrize(
    "model, message",
    [
        ({"lora": {"rank": 2, "targets": ["wqq"]}}, "no linear layer 'wqq'; did you mean 'wq'"),
        ({"lora": {"rank": 16}}, "smaller side of wk, 16"),
        ({"lora": {"rank": -1}}, "model.lora.rank: input should be greater than or equal to 0"),
        ({"lora": {"rank": 2}, "init": "random"}, "train all weights"),
    ],
)
def test_adapters_that_cannot_be_are_refused(run_config, model, message):
    values = run_config(model=model | {"path": run_config()["model"]["path"]})
    with pytest.raises(UserError, match=message):
        train(parse_config(values))
    assert not Path(values["output"]).exists()


@pytest.mark.slow
def test_a_model_of_1p7b_is_trained_in_24_gb():
    """Compile the update of Qwen3-1.7B in bfloat16 with rank 16 and four microbatches; nothing is allocated."""
    sizes = {"vocab_size": 151936, "width": 2048, "num_layers": 28, "num_heads": 16, "num_kv_heads": 8}
    sizes |= {"head_width": 128, "ffn_width": 6144, "max_positions": 40960}
    config = ModelConfig("qwen3", **sizes, qk_norm=True, tie_embeddings=True)
    optimizer, adapters = make_optimizer(OptimizerConfig(), 100), Lora(rank=16, alpha=32.0)
    trained = lora.abstract_params(config, adapters)
    base = Frozen(decoder.abstract_params(config, jnp.bfloat16), adapters.scale)
    state = TrainState(trained, jax.eval_shape(optimizer.init, trained), frozen=base)
    ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    groups = Groups(ids(4, 256), ids(4), ids(4, 8, 224))
    cotangent = TokenStats(jax.ShapeDtypeStruct((4, 8, 224), jnp.float32))
    runner = ModelRunner(config, token_budget=2048, dtype=jnp.bfloat16, remat=True)
    memory = update.lower(runner, optimizer, state, groups, cotangent).compile().memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert 4e9 < memory.argument_size_in_bytes + memory.temp_size_in_bytes + new < 24e9
