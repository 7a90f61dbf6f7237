"""The simplex picture: targets and updates are those of the objectives, and trajectories end where theory predicts."""

import numpy as np
import pytest
from matplotlib.image import imread

from lpo_jax import objectives as O
from lpo_jax.errors import UserError
from lpo_jax.reporting.simplex import draw, update_field

REWARDS = (1.0, 0.5, 0.0)


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def test_forward_projection_ends_at_its_target_and_a_policy_gradient_passes_by():
    R = np.array(REWARDS)
    target = softmax(R / R.std())
    points, found, field, trajectory = update_field(REWARDS, O.get("lpo-forward"))
    np.testing.assert_allclose(points.sum(-1), 1)
    np.testing.assert_allclose(found, target, rtol=1e-5)
    np.testing.assert_allclose(trajectory[0], 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(trajectory[-1], target, atol=1e-2)
    # dP = -(diag P - P P') c in NumPy, with c = P - w*.
    c = points - target
    np.testing.assert_allclose(field, -points * (c - (points * c).sum(-1, keepdims=True)), atol=1e-6)
    np.testing.assert_allclose(field.sum(-1), 0, atol=1e-6)

    _, implied, _, trajectory = update_field(REWARDS, O.get("grpo"))
    np.testing.assert_allclose(implied, target, rtol=1e-5)
    assert trajectory[-1][0] > 0.95
    # The trajectory passes through the implied target: P = softmax(t A / K) equals it at t = K.
    assert np.linalg.norm(trajectory - target, axis=-1).min() < 0.02


def test_methods_with_a_reference_take_the_behaviour_policy_as_reference():
    _, target, _, trajectory = update_field(REWARDS, O.get("copg", temperature=0.5))
    np.testing.assert_allclose(target, softmax(np.array(REWARDS) / 0.5), rtol=1e-5)
    np.testing.assert_allclose(trajectory[-1], target, atol=1e-2)


def test_draw_writes_one_panel_per_method(tmp_path):
    methods = {"a": O.get("lpo-forward", target="one-hot"), "b": O.get("real")}
    path = draw(REWARDS, methods, tmp_path / "picture.png")
    picture = imread(path)
    assert picture.shape[1] > 1.5 * picture.shape[0] and picture[..., :3].std() > 0.05
    assert path.stat().st_size < 150_000


def test_equal_rewards_can_be_drawn(tmp_path):
    _, target, field, _ = update_field((1, 1, 1), O.get("lpo-forward"))
    np.testing.assert_allclose(target, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(field[0], 0, atol=1e-7)
    assert draw((1, 1, 1), {"grpo": O.get("grpo")}, tmp_path / "flat.png").exists()


@pytest.mark.parametrize(
    ("rewards", "name", "says"),
    [
        ((1, 0), "grpo", "needs three finite rewards, such as 1,0,0; got [1, 0]"),
        ((1, 0, float("inf")), "grpo", "needs three finite rewards"),
        (REWARDS, "flowrl", "flowrl: cannot be drawn from rewards alone; it also needs control, features"),
    ],
)
def test_what_cannot_be_drawn(rewards, name, says, tmp_path):
    with pytest.raises(UserError) as error:
        draw(rewards, {name: O.get(name)}, tmp_path / "x.png")
    assert says in str(error.value)
    assert not list(tmp_path.iterdir())
