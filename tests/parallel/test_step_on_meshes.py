"""A training step on any mesh of eight fake devices equals that on one device."""

import json

import chex
import jax
import numpy as np
import pytest
from precision import EXACT, GRADIENT_ROUNDING, in_float64
from whole_runs import pad_groups, skip_plots

from lpo_jax import load_model
from lpo_jax.config import parse_config
from lpo_jax.models.placement import param_shardings
from lpo_jax.models.runner import Groups, ModelRunner
from lpo_jax.objectives import TokenStats
from lpo_jax.parallel.mesh import MeshSizes, build_mesh
from lpo_jax.reporting import metric_names, read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.training.loop import train

# Eight prompts in each of two updates. With an eps of 1 Adam's updates show the gradient itself, not its sign alone,
# so the trained parameters show whether the gradients agree.
SETTINGS = {
    "training": {"steps": 1, "prompts_per_step": 16, "updates_per_step": 2, "token_budget": 80},
    "optimizer": {"learning_rate": 0.01, "eps": 1.0, "clip_norm": 0.0},
    "evaluation": {"problems": 5},
}


@pytest.fixture(scope="module")
def step_on(tmp_path_factory, tiny_model, tiny_task):
    """Run a step and return its metrics, rollouts and parameters."""
    from tiny import run_values

    def run(**mesh):
        output = tmp_path_factory.mktemp("mesh") / "run"
        values = run_values(output, tiny_model, tiny_task)
        for section, keys in SETTINGS.items():
            values[section] = {**values[section], **keys}
        with pytest.MonkeyPatch.context() as patch:
            skip_plots(patch)
            pad_groups(patch)
            train(parse_config(values | {"mesh": mesh}))
        rows = [json.loads(line) for line in (output / "rollouts" / "1.jsonl").read_text().splitlines()]
        return read_metrics(output), rows, load_run(output, "latest")[0].params

    return run


@pytest.fixture(scope="module")
def one_device(step_on):
    return step_on(devices=1)


@pytest.mark.parametrize(
    "data, fsdp, tensor, decode_tensor",
    [
        pytest.param(8, 1, 1, 1, marks=pytest.mark.slow),
        pytest.param(1, 8, 1, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, 2, 1, marks=pytest.mark.slow),
        pytest.param(1, 8, 1, 2, marks=pytest.mark.slow),
        # Matrices are split over two devices while sampling, and whole while training; the gradient of matrices that
        # are split is tested below.
        (2, 4, 1, 2),
        pytest.param(1, 4, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_equals_one_device(step_on, one_device, tiny_model, data, fsdp, tensor, decode_tensor):
    metrics, rollouts, params = step_on(data=data, fsdp=fsdp, tensor=tensor, decode_tensor=decode_tensor)
    expected_metrics, expected_rollouts, expected_params = one_device
    assert [row["output"] for row in rollouts] == [row["output"] for row in expected_rollouts]
    for name in ("target", "policy", "coefficient"):
        close([row[name] for row in rollouts], [row[name] for row in expected_rollouts])
    assert len(metrics) == len(expected_metrics) > 2
    for row, expected in zip(metrics, expected_metrics):
        assert row.keys() == expected.keys()
        for name in sorted(row):
            if not metric_names.is_timing(name) and not name.startswith(("lpo/logp_gap", "training/rollout")):
                # A score is the difference of log-probs of whole responses, which are ten times its size.
                close(row[name], expected[name], name, 3e-5 if name == "lpo/score_abs_max" else 0.0)
    start = load_model(tiny_model).params
    learnt = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), params, start)
    expected = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), expected_params, start)
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(learnt), jax.tree.leaves(expected), jax.tree.leaves(start)
    )
    for (path, found), wanted, old in leaves:
        close(found, wanted, path, rounding=4e-7 * np.linalg.norm(old))  # of a sum with the parameter itself


def close(found, expected, what="", rounding=0.0):
    """Check that norms are equal up to the rounding of a gradient in each of the two runs."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    scale = max(np.linalg.norm(expected), 1e-2)
    error = np.linalg.norm(found - expected)
    np.testing.assert_array_less(error, 2 * GRADIENT_ROUNDING * scale + rounding, err_msg=str(what))


@pytest.mark.parametrize("data, fsdp, tensor", [(2, 2, 2), pytest.param(8, 1, 1, marks=pytest.mark.slow)])
@in_float64
def test_gradient_in_float64_is_exact(tiny_config, tiny_params, data, fsdp, tensor):
    """Part 3 of the step, microbatch by microbatch; prompts, parameters and heads lie on different devices."""
    P, K, S, T = 16, 2, 4, 3
    rng = np.random.default_rng(0)
    ids = lambda *shape: rng.integers(1, tiny_config.vocab_size, shape).astype(np.int32)  # noqa: E731
    groups = Groups(ids(P, S), rng.integers(1, S + 1, P).astype(np.int32), ids(P, K, T))
    cotangent = TokenStats(rng.normal(size=(P, K, T)))
    runner = ModelRunner(tiny_config, token_budget=S + K * T, dtype=np.float64)
    pull_back = jax.jit(ModelRunner.pull_back, static_argnums=0)
    want, want_stats = pull_back(runner, tiny_params, groups, cotangent)
    mesh = build_mesh(MeshSizes(data, fsdp, tensor))
    with jax.set_mesh(mesh):
        params = jax.device_put(tiny_params, param_shardings(tiny_config, mesh))
        got, got_stats = pull_back(runner, params, groups, cotangent)
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float64)}
    assert len(got["layers"]["wq"].sharding.device_set) == 8
    chex.assert_trees_all_close(got_stats.logp, want_stats.logp, rtol=EXACT, atol=EXACT)
    for found, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        error = np.linalg.norm(np.asarray(found) - np.asarray(wanted))
        np.testing.assert_array_less(error, EXACT * np.linalg.norm(wanted))
