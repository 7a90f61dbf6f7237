"""Groups that an objective leaves out: as if they had not been sampled, whatever the policy is."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import batch, full_batch, put, run, some

from lpo_jax import objectives as O
from lpo_jax.objectives.batch import Source
from lpo_jax.objectives.shaping import Shape


def test_degenerate_keep_pulls_back_and_mask_leaves_out():
    stats, scored = batch(seed=12, off=0.05)
    for name in ("lpo-forward", "lpo-reverse"):
        keep, mask = (run(O.get(name, degenerate=d), stats, scored) for d in ("keep", "mask"))
        # Kept: the policy moved off P_t, so it is pulled back; c = P - 1/K.
        assert np.abs(keep[2][2]).max() > 1e-4
        assert mask[1]["lpo/degenerate_group_frac"] == keep[1]["lpo/degenerate_group_frac"] > 0
        # Masked: as if the group had never been sampled.
        loss, _, gradient = run(O.get(name), stats, scored.replace(mask=put(scored.mask, 2, False)))
        np.testing.assert_allclose(mask[0], loss, rtol=1e-6)
        np.testing.assert_allclose(mask[2], gradient, rtol=1e-5, atol=1e-8)
    # GRPO gives such a group nothing either way; "mask" takes it out of the mean.
    keep, mask = (run(O.get("grpo", degenerate=d), stats, scored)[2] for d in ("keep", "mask"))
    np.testing.assert_array_equal(keep[2], 0)
    np.testing.assert_allclose(mask, 1.5 * keep, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", some(O.names(), "lpo-forward", "poise", "empo", "fapo"))
def test_groups_that_are_left_out_need_no_statistics(name):
    """Whatever stands there, the rest is equal, so that `lpo_jax.training.learner` does not compute them."""
    objective = O.get(name, degenerate="mask")
    stats, scored = full_batch(seed=21, off=0.3, objective=objective)
    clusters = np.array([[0, 0, 0, 1], [1, 0, 0, 0], [2, 2, 2, 2]], np.int32)
    scored = scored.replace(
        passed=put(scored.passed, 2, False), flawed=put(scored.flawed, 2, False), clusters=clusters
    )
    left = np.asarray(objective.left_out(scored))
    rng, there = np.random.default_rng(0), np.flatnonzero(left)
    noise = jax.tree.map(lambda x: put(x, there, rng.random((len(there), *x.shape[1:]))), stats)
    want, got = (
        jax.device_get(
            (*run(objective, x, scored), objective.next_control(x, scored), objective.listwise(x, scored))
        )
        for x in (stats, noise)
    )
    chex.assert_trees_all_equal(got, want)
    np.testing.assert_array_equal(got[2][left], 0)
    assert np.abs(got[2]).max() > 0
    # Rewards that a hook or the policy shapes are not known before.
    early = all(field.source is Source.SAMPLING for part in objective.shape for field in part.reads)
    assert left[2] == early and not left[:2].any()


def test_rewards_that_depend_on_the_policy_leave_no_group_out():
    @dataclasses.dataclass(frozen=True)
    class Drift(Shape):
        def __call__(self, context):
            return context.rewards - jnp.abs(context.delta).sum(-1)

    objective = dataclasses.replace(O.get("lpo-forward", degenerate="mask"), shape=(Drift(),))
    assert not objective.left_out(batch(seed=22)[1]).any()
