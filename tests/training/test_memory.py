"""Decisions of `training.remat: auto`."""

import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from lpo_jax.config import override_config, parse_config
from lpo_jax.parallel.sharding import AXES, using
from lpo_jax.training import memory
from lpo_jax.training.intro import batch_sizes
from lpo_jax.training.memory import Microbatch, fit_microbatch, kept_bytes
from lpo_jax.training.session import open_session

STATE = 16 * 1000
# Groups of 64 + 8 x 1000 tokens; an update has two of them.
SIZES = [
    *("--training.prompts_per_step=4", "--training.updates_per_step=2", "--training.token_budget=20000"),
    *("--sampling.num_responses=8", "--sampling.max_prompt_tokens=64", "--sampling.max_tokens=1000"),
    *("--warm_start.steps=0", "--training.remat=auto"),
]
UPDATE = 2 * 8064


def fit(run_config, model, monkeypatch, free, *more):
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    return fit_microbatch(override_config(parse_config(run_config()), [*SIZES, *more]), model, STATE)


def free_for(model, tokens):
    """Free bytes needed to keep the activations of a row of `tokens` tokens: twice their size plus the state."""
    return 2 * kept_bytes(model, tokens, "float32") + STATE


@pytest.mark.parametrize("setting", [True, False])
def test_what_is_asked_for_is_done(run_config, tiny_config, monkeypatch, setting):
    free = 1 if not setting else 1 << 60
    found = fit(run_config, tiny_config, monkeypatch, free, f"--training.remat={str(setting).lower()}")
    assert found == Microbatch(20000, setting)


def test_auto_keeps_what_fits_into_half_of_what_the_state_leaves(run_config, tiny_config, monkeypatch):
    free = free_for(tiny_config, UPDATE)
    assert fit(run_config, tiny_config, monkeypatch, free) == Microbatch(20000, remat=False)
    assert fit(run_config, tiny_config, monkeypatch, free - 1) == Microbatch(10000, remat=False)


@pytest.mark.parametrize("budget", [10000, 5000, 2500])
def test_auto_keeps_layers_in_shorter_rows(run_config, tiny_config, monkeypatch, budget):
    free = free_for(tiny_config, budget)
    assert fit(run_config, tiny_config, monkeypatch, free) == Microbatch(budget, remat=False)


@pytest.mark.parametrize(
    "more, shortest",
    [
        ((), 2500),
        (("--sampling.max_tokens=4000",), 5000),  # a row must hold at least one response with its prompt
        (("--training.prompts_per_step=2", "--sampling.num_responses=2"), 2064),  # all tokens of an update
        (("--training.token_budget=500",), 1064),  # the least possible, although the budget is smaller
    ],
)
def test_auto_recomputes_where_the_shortest_row_does_not_fit(
    run_config, tiny_config, monkeypatch, more, shortest
):
    free = free_for(tiny_config, shortest)
    assert not fit(run_config, tiny_config, monkeypatch, free, *more).remat
    assert fit(run_config, tiny_config, monkeypatch, free - 1, *more).remat
    assert fit(run_config, tiny_config, monkeypatch, 0, *more).remat


def test_auto_recomputes_where_prompts_run_again_would_cost_as_much(run_config, tiny_config, monkeypatch):
    # A group whole: 1500 + 8 x 500 tokens; in rows of 5000 two pieces of four responses: 7000; of 2500 four: 10000.
    sizes = ["--sampling.max_prompt_tokens=1500", "--sampling.max_tokens=500"]
    free = free_for(tiny_config, 5000)
    assert fit(run_config, tiny_config, monkeypatch, free, *sizes) == Microbatch(5000, remat=False)
    assert fit(run_config, tiny_config, monkeypatch, free - 1, *sizes) == Microbatch(20000, remat=True)


@pytest.mark.parametrize(
    "axes, fit_in", [((8, 1, 1), Microbatch(10000, False)), ((1, 8, 1), Microbatch(20000, True))]
)
def test_rows_stay_long_where_every_microbatch_gathers_parameters(
    run_config, tiny_config, monkeypatch, axes, fit_in
):
    with using(jax.make_mesh(axes, AXES, axis_types=(AxisType.Auto,) * 3)):
        assert fit(run_config, tiny_config, monkeypatch, free_for(tiny_config, 10000)) == fit_in


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_goes_by_it_and_says_so(run_config, monkeypatch, rank):
    sizes = ["--sampling.max_prompt_tokens=16", "--sampling.max_tokens=64", "--training.prompts_per_step=24"]
    config = override_config(parse_config(run_config()), [*SIZES, *sizes, f"--model.lora.rank={rank}"])
    with open_session(config) as session:
        trained = sum(leaf.size for leaf in jax.tree.leaves(session.model.trainable))
        state = 16 * trained + (4 * session.model.num_params if rank else 0)  # LoRA: and the base
        free = 2 * kept_bytes(session.model.architecture, 5000, "float32") + state
        monkeypatch.setattr(memory, "free_memory", lambda: free)
        runner = session.model.runner(1.0)
        assert (runner.token_budget, runner.remat) == (5000, False)
        said = {name: (value, meaning) for name, value, meaning in batch_sizes(session, runner)}
        assert said["layers in the backward pass"] == (
            "kept",
            "training.remat, in rows of 5000 tokens at most",
        )
        assert said["tokens per row"][0] <= 5000

        monkeypatch.setattr(memory, "free_memory", lambda: free - 1)
        fresh = dataclasses.replace(session.model)  # the decision is made once per run
        assert session.model.microbatch.token_budget == 5000 and fresh.microbatch.token_budget == 2500


def test_halving_precision_halves_what_is_kept(tiny_config):
    assert kept_bytes(tiny_config, 4096, "float32") == 2 * kept_bytes(tiny_config, 4096, "bfloat16")


def test_the_largest_update_counts_prompts_once_and_the_warm_start(run_config):
    sizes = ["--training.prompts_per_step=8", "--training.updates_per_step=2", "--sampling.num_responses=4"]
    lengths = ["--sampling.max_prompt_tokens=20", "--sampling.max_tokens=10"]
    config = override_config(parse_config(run_config()), [*sizes, *lengths, "--warm_start.batch_size=16"])
    assert memory.most_update_tokens(override_config(config, ["--warm_start.steps=0"])) == 4 * (20 + 40)
    assert memory.most_update_tokens(override_config(config, ["--warm_start.steps=1"])) == 16 * 30
