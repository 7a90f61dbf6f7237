"""One training step on eight fake devices is the step of one device, whatever the mesh."""

import json

import jax
import numpy as np
import pytest

from lpo_jax.config import parse_config
from lpo_jax.models.load import load_model
from lpo_jax.reporting import metric_names, read_metrics
from lpo_jax.training.checkpoint import load_run
from lpo_jax.training.loop import train

# Eight prompts in each of two updates. With an eps of 1 Adam's updates show the gradient itself, not its sign alone,
# and so what was learnt tells whether the gradients agree.
SETTINGS = {
    "training": {"steps": 1, "prompts_per_step": 16, "updates_per_step": 2, "token_budget": 80},
    "optimizer": {"learning_rate": 0.01, "eps": 1.0, "clip_norm": 0.0},
    "evaluation": {"problems": 5},
}


@pytest.fixture(scope="module")
def step_on(tmp_path_factory, tiny_model, tiny_task):
    """Runs a step and gives its metrics, rollouts and parameters."""
    from tiny import run_values

    def run(**mesh):
        output = tmp_path_factory.mktemp("mesh") / "run"
        values = run_values(output, tiny_model, tiny_task)
        for section, keys in SETTINGS.items():
            values[section] = {**values[section], **keys}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lpo_jax.reporting.save_plots", lambda run: [])
            train(parse_config(values | {"mesh": mesh}))
        rows = [json.loads(line) for line in (output / "rollouts" / "1.jsonl").read_text().splitlines()]
        return read_metrics(output), rows, load_run(output, "latest")[0].params

    return run


@pytest.fixture(scope="module")
def one_device(step_on):
    return step_on(devices=1)


@pytest.mark.parametrize(
    "data, fsdp, tensor",
    [
        pytest.param(8, 1, 1, marks=pytest.mark.slow),
        pytest.param(1, 8, 1, marks=pytest.mark.slow),
        (2, 2, 2),
        pytest.param(1, 4, 2, marks=pytest.mark.slow),
    ],
)
def test_equals_one_device(step_on, one_device, tiny_model, data, fsdp, tensor):
    metrics, rollouts, params = step_on(data=data, fsdp=fsdp, tensor=tensor)
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
        close(found, wanted, path, rounding=4e-7 * np.abs(old).max())  # of a sum with the parameter itself


def close(found, expected, what="", rounding=0.0):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-5 * max(scale, 1e-2) + rounding, err_msg=str(what)
    )
