"""Every method in a short run, its state in a resume, and schedules."""

import chex
import numpy as np
import pytest

from lpo_jax import objectives
from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.reporting import read_metrics
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.training import loop, optimizer
from lpo_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("no_plots")

# Required options of methods, and settings that keep their additional programs few and small.
SETTINGS = {
    "fapo": {"judge": "flawed"},
    "capo-credit": {"judge": "wrong_steps"},
    "scaf-grpo": {"hint_after": 0},
    "ghpo": {"hint_fractions": [0.5]},
    "grpo-vps": {"segments": 2, "cue": "="},
    "brpo": {"budgets": 2, "summaries": 2, "summary_tokens": 2, "cue": "="},
    "srpo": {"reprompt": "{solution}"},
    # A random model is much less confident than a trained one: with the papers' limits there is no signal.
    "gtpo": {"entropy_limit": 10.0},
    "empo": {"entropy_threshold": 10.0},
    "capo-calibration": {"ppl_correct_max": 1e6},
}

# Every test run includes a method with a state, one whose hook samples, and one whose hook judges. The others, which
# differ in array operations or compile large programs (longer prompts, a teacher), take minutes: `pytest -m slow`.
ALWAYS = ["vas", "dapo", "capo-credit"]


def by_weight(names):
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Methods whose control or hooks have a state that does not depend on the length of the run.
STATEFUL = ["riskpo", "poise", "flowrl", "r2vpo", "pipo", "vas", "fg-expo"]


@pytest.fixture
def method_config(run_config, tiny_task):
    """Make the config of a short run of a method, with one held-out problem and a checkpoint at the end only."""

    def make(name, output, steps):
        options = {"name": name, **SETTINGS.get(name, {})}
        if "judge" in options:
            options["judge"] = f"{tiny_task}:{options['judge']}"
        return run_config(
            output=output,
            objective=options,
            training={"steps": steps, "save_rollouts": False},
            evaluation={"problems": 4, "every": 0},
            checkpoint={"every": 0, "keep": 1},
        )

    return make


@pytest.mark.parametrize("name", by_weight(objectives.names()))
def test_every_method_trains_resumes_and_reports(method_config, one_layout, run_params, name):
    """Methods with a state are resumed after two steps; `test_resume_is_exact` covers the others."""
    method, config = objectives.get(name), method_config(name, "run", 3)
    if method.control or method.hooks or "ref_logp" in method.needs:
        train(parse_config(method_config(name, "run", 2)))
    train(parse_config(config), resume=True)
    params = load_run(config["output"], "latest")[0].params
    rows = [row for row in read_metrics(config["output"]) if "actor/pg_loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(row["actor/pg_loss"]) and row["actor/grad_norm"] >= 0 for row in rows)
    assert max(row["actor/grad_norm"] for row in rows) > 0
    assert all(row["lpo/skipped_updates"] == 0 for row in rows)
    assert float(np.abs(params["layers"]["wq"] - run_params["layers"]["wq"]).max()) > 1e-4


@pytest.mark.parametrize("name", by_weight(STATEFUL))
def test_state_of_a_method_survives_a_resume(method_config, one_layout, name):
    constant = {"optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0, "schedule": "constant"}}
    whole = method_config(name, "whole", 4) | constant
    train(parse_config(whole))
    for steps in (2, 4):
        parts = method_config(name, "parts", steps) | constant
        train(parse_config(parts), resume=steps == 4)
    ends = [load_run(config["output"], "latest")[0].params for config in (whole, parts)]
    chex.assert_trees_all_equal(*ends)


@pytest.mark.slow
def test_reference_stays_where_the_run_began(method_config):
    """The penalty is 0 at the first update, when the policy is the reference, and positive later."""
    for coefficient in (0.0, 0.1):
        config = method_config("grpo", f"kl{coefficient}", 3)
        config["objective"]["kl_coef"] = coefficient
        config["training"]["updates_per_step"] = 1
        train(parse_config(config))
        rows = [row for row in read_metrics(config["output"]) if "actor/pg_loss" in row]
        assert ("actor/kl_loss" in rows[-1]) == (coefficient > 0)
        if coefficient:
            assert rows[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-6)  # the initial policy
            assert rows[-1]["actor/kl_loss"] > 0


def rates_of(config):
    return [row["actor/lr"] for row in read_metrics(config["output"]) if "actor/lr" in row]


DECAYING = {"schedule": "linear", "learning_rate": 1e-2, "final_fraction": 0.1, "weight_decay": 0.0}


@pytest.mark.slow
def test_replayed_updates_count_in_the_schedule(method_config, one_layout, monkeypatch):
    """The learning rate falls with every update, including replayed ones, until the last step of the run."""
    config = method_config("pipo", "run", 4)
    config["optimizer"] = DECAYING
    counts = []
    used = optimizer.Optimizer.rate_used
    monkeypatch.setattr(
        optimizer.Optimizer,
        "rate_used",
        lambda self, state: counts.append(optimizer.applied_updates(state)) or used(self, state),
    )
    train(parse_config(config))
    rates, updates = rates_of(config), np.diff([0, *counts])
    assert set(updates) == {2, 3}  # steps of two updates, some of which replay a batch
    expected = [1e-2 * (1 - 0.9 * (count - 1) / 12) for count in counts]  # of 4 x 3 updates at most
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.slow
def test_an_extended_run_keeps_its_schedule(method_config, one_layout, monkeypatch):
    """After the end of the schedule the learning rate stays at its final value, and `progress` at 1."""
    first, longer = (method_config("lpo-forward", "run", steps) for steps in (2, 4))
    first["optimizer"] = longer["optimizer"] = DECAYING
    train(parse_config(first))
    seen, make_batch = [], loop.make_batch
    monkeypatch.setattr(loop, "make_batch", lambda *a: seen.append(a[2]) or make_batch(*a))
    train(parse_config(longer), resume=True)
    assert seen == [1, 1]
    rates = rates_of(longer)
    assert rates == sorted(rates, reverse=True) and rates[2:] == pytest.approx([1e-3, 1e-3])


def test_steps_beyond_a_schedule_that_ends_at_0_are_refused(run_config):
    def check(steps, **settings):
        values = run_config(training={"steps": steps}, optimizer={"schedule": "cosine"} | settings)
        loop.check_extension(parse_config(values), schedule_steps=4)

    check(4), check(3), check(8, schedule="constant"), check(8, final_fraction=0.1)
    with pytest.raises(
        UserError, match=r"cannot resume with training.steps = 8: .* after the 4 steps"
    ) as error:
        check(8)
    assert "\n" not in str(error.value)
