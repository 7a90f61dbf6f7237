"""Plans at given response lengths: the lengths, simulated sampling against the real batching, and the text."""

import dataclasses
import importlib.util
import json
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import CONFIG

from lpo_jax.commands.main import main
from lpo_jax.errors import UserError
from lpo_jax.parallel.mesh import MeshSizes
from lpo_jax.planner import roofline, simulation, topology
from lpo_jax.planner.at_lengths import at_lengths
from lpo_jax.planner.lengths import response_lengths
from lpo_jax.planner.phases import SPARE
from lpo_jax.planner.setting import Setting, Workload
from lpo_jax.planner.simulation import simulate_pages, simulate_slots
from lpo_jax.sampling import PromptBatch, Sampler, SampleRequest, batching, decode, kv_cache
from lpo_jax.sampling.calls import look_seconds
from lpo_jax.sampling.kv_cache import Capacity
from lpo_jax.sampling.pages import Pool

CHIP = topology.CHIPS["v5e"]
LIMIT = 512
NO_MODEL = types.SimpleNamespace(num_layers=0, num_kv_heads=1, head_width=1)
TOKENS = 32  # of a call of a model without weights, whose steps take no time


def log_normal(P, K, mean=LIMIT // 4, limit=LIMIT):
    return response_lengths(f"mean={mean},sigma=1.0", P, K, limit)


@pytest.fixture(scope="module")
def tail():
    """The benchmark whose fake device runs the real batching."""
    path = Path(__file__).parents[2] / "benchmarks" / "tail.py"
    spec = importlib.util.spec_from_file_location("tail", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_mean_is_that_after_the_cut():
    lengths = log_normal(4096, 8)
    assert lengths.min() >= 1 and lengths.max() == LIMIT
    assert lengths.mean() == pytest.approx(LIMIT / 4, rel=0.03)
    np.testing.assert_array_equal(response_lengths("mean=7, sigma=0", 2, 3, LIMIT), np.full((2, 3), 7))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("mean=10", "neither of the form mean=1024,sigma=1.0 nor the directory"),
        ("mean=1.2.3,sigma=1", "must be numbers"),
        ("mean=512,sigma=1", "below sampling.max_tokens = 512"),
        ("mean=10,sigma=9", "sigma at most"),
    ],
)
def test_malformed_lengths_are_refused(source, says):
    with pytest.raises(UserError, match=says):
        response_lengths(source, 2, 2, LIMIT)


def write_run(path, groups):
    (path / "rollouts").mkdir(parents=True)
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    rows = [
        {"id": p, "k": k, "output": "", "tokens": n} for p, ns in enumerate(groups) for k, n in enumerate(ns)
    ]
    if rows:
        (path / "rollouts" / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_recorded_lengths_are_those_of_the_groups(tmp_path):
    run = write_run(tmp_path / "run", [[3, 600], [5, 7]])
    np.testing.assert_array_equal(response_lengths(str(run), 2, 2, LIMIT), [[3, LIMIT], [5, 7]])
    more = response_lengths(str(run), 8, 4, LIMIT)  # drawn with replacement, within groups
    assert all(set(group) <= {3, LIMIT} or set(group) <= {5, 7} for group in more.tolist())


@pytest.mark.parametrize("kv_tokens", [0, 2 * 128 * 20])
@pytest.mark.parametrize("max_rows", [0, 32])
def test_simulated_pages_are_those_of_the_real_batching(tail, max_rows, kv_tokens):
    P, K, shards = 32, 4, 2
    lengths, counts = log_normal(P, K), {"steps": 0, "prefilled": 0}
    sampler = Sampler(
        NO_MODEL,
        (-1,),
        max_rows=max_rows,
        attention="interpret",
        kv_tokens=kv_tokens,
    )
    prompts = PromptBatch(np.ones((P, 4), np.int32), np.full(P, 4), np.arange(P))
    with tail.no_device(shards, counts):
        sampler(None, prompts, SampleRequest(K, LIMIT), budgets=lengths)
    found = simulate_pages(lengths, Pool.of(P, K, 4, LIMIT, max_rows, kv_tokens, shards), 3, shards, TOKENS)
    assert found.steps == counts["steps"]
    assert sum(call.rows * call.steps for call in found.calls) >= lengths.sum()
    assert (found.repeated > 0) == (kv_tokens > 0)


@pytest.mark.parametrize("max_rows", [0, 32, 64])
def test_simulated_slots_are_those_of_the_real_batching(max_rows, monkeypatch):
    """With plain attention; its device functions are replaced by counters."""
    P, K, shards = 32, 4, 2
    lengths, counts = log_normal(P, K), {"steps": 0, "slots": 0, "prefilled": 0}

    def draw(settings, weights, state, prompt_lengths, prompt_kv, tokens, index, limit, least):
        drawn, active, steps = state.drawn.copy(), state.active, 0
        while steps < limit and active.sum() >= least:
            drawn, steps = drawn + active, steps + 1
            active = active & (drawn < state.budget)
        counts["steps"] += steps
        counts["slots"] += steps * len(drawn) // shards
        ones = np.ones((len(drawn), settings.call_tokens), np.int32)
        return decode.DecodeOutput(ones, ones, ones, drawn, active, steps), tokens

    def prefill(config, dtype, stored, attention, weights, tokens, lengths, images):
        counts["prefilled"] += tokens.shape[0] // shards

    for module in (batching, simulation):
        monkeypatch.setattr(module, "LAST_SLOTS", 16)
    monkeypatch.setattr(decode, "decode", draw)
    monkeypatch.setattr(kv_cache, "prefill", prefill)
    monkeypatch.setattr(kv_cache, "allocate", lambda config, dtype, sequences, tokens: tokens)
    monkeypatch.setattr(kv_cache, "resize", lambda cache, sequences, shift, tokens: tokens)
    monkeypatch.setattr(kv_cache, "insert_prompts", lambda cache, *rest: cache)
    monkeypatch.setattr("lpo_jax.parallel.sharding.batch_shards", lambda: shards)
    sampler = Sampler(
        NO_MODEL,
        (-1,),
        max_rows=max_rows,
        attention="plain",
    )
    prompts = PromptBatch(np.ones((P, 4), np.int32), np.full(P, 4), np.arange(P))
    sampler(None, prompts, SampleRequest(K, LIMIT), budgets=lengths)
    found = simulate_slots(lengths, Capacity.of(P, K, LIMIT, max_rows, shards), shards, TOKENS)
    slots = sum(call.steps * call.slots for call in found.calls)
    assert (found.steps, slots, found.prompts) == tuple(counts.values())


def test_a_small_pool_sets_rows_aside_and_finishes():
    lengths = log_normal(16, 4)
    pool = Pool.of(16, 4, 16, LIMIT, 0, 2 * 128 * 20, 2)
    found = simulate_pages(lengths, pool, 15, 2, TOKENS)
    assert found.repeated > 0
    assert found.steps > simulate_pages(lengths, Pool.of(16, 4, 16, LIMIT, 0, 0, 2), 15, 2, TOKENS).steps


WORK = Workload(CONFIG, 64, 8, 128, 4096, 2, 2, False, 1, kernels=True)
SETTING = Setting(MeshSizes(2, 2, 1), token_budget=128 + 4 * 4096, remat=True, rows=64)


def sampling_memory(phases):
    return max(phase.memory for phase in phases if phase.name in ("prefill", "decode"))


def test_pages_hold_three_times_the_rows_in_the_same_memory():
    phases = roofline.estimate_phases(WORK, SETTING)
    full = dataclasses.replace(CHIP, memory=sampling_memory(phases) / (1 - SPARE))
    found = at_lengths(WORK, SETTING, phases, log_normal(64, 8, 1024, 4096), full)
    assert found.pages.sampled.rows_at_once >= 3 * found.reserved.sampled.rows_at_once
    assert found.pages.seconds["decode"] < found.reserved.seconds["decode"]
    assert found.pages.seconds["update"] == found.reserved.seconds["update"]
    # The pages, and what more rows need, fit into the memory of the cache that they replace.
    kept = roofline.standing(WORK, found.pages.setting)["keys and values"]
    assert kept <= 1.001 * roofline.standing(WORK, SETTING)["keys and values"]


def test_pages_take_the_memory_that_sampling_leaves_free():
    lengths = log_normal(64, 8, 1024, 4096)
    phases = roofline.estimate_phases(WORK, SETTING)
    found = {}
    for memory in (1.1, 1.4):
        chip = dataclasses.replace(CHIP, memory=memory * sampling_memory(phases))
        found[memory] = at_lengths(WORK, SETTING, phases, lengths, chip)
        needed = sampling_memory(roofline.estimate_phases(WORK, found[memory].pages.setting))
        assert 0.8 * chip.memory < needed <= (1 - SPARE) * chip.memory
    assert found[1.4].pages.seconds["decode"] < found[1.1].pages.seconds["decode"]
    assert found[1.4].reserved.seconds == found[1.1].reserved.seconds


def test_a_pool_of_the_config_is_planned_as_it_is():
    setting = dataclasses.replace(SETTING, rows=256, kv_tokens=200_000)
    phases = roofline.estimate_phases(WORK, setting)
    found = at_lengths(WORK, setting, phases, log_normal(64, 8, 1024, 4096), CHIP)
    assert found.pages.setting == setting and found.reserved.setting.kv_tokens == 0
    pool = found.reserved.setting.pool(WORK)
    assert setting.decode_shards * pool.pages * pool.page_size <= setting.kv_tokens
    assert found.reserved.setting.rows < setting.rows
    # At full length fewer rows fit than there are slots.
    assert setting.calls(WORK) > dataclasses.replace(setting, kv_tokens=0).calls(WORK)


def test_full_lengths_take_the_time_of_the_plan():
    phases = roofline.estimate_phases(WORK, SETTING)
    found = at_lengths(WORK, SETTING, phases, np.full((64, 8), 4096), CHIP).reserved
    for phase in phases:
        assert found.seconds[phase.name] == pytest.approx(phase.seconds(CHIP), rel=0.05), phase.name


def test_full_lengths_in_a_small_pool_take_the_time_of_the_plan():
    """Rows that begin together fill the pool together; those that wait for pages then read nothing."""
    setting = dataclasses.replace(SETTING, rows=256, kv_tokens=200_000)
    phases = {phase.name: phase for phase in roofline.estimate_phases(WORK, setting)}
    found = at_lengths(WORK, setting, list(phases.values()), np.full((64, 8), 4096), CHIP).pages
    looks = sum(look_seconds(call.rows) for call in found.sampled.calls)
    planned = dataclasses.replace(phases["decode"], host=0.0).seconds(CHIP)
    assert found.seconds["decode"] - looks == pytest.approx(planned, rel=0.05)
    assert 0.5 < setting.tokens_read(WORK) / (setting.kv_tokens / setting.decode_shards) < 0.95


@pytest.fixture
def config_file(tmp_path, run_config, tiny_model):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config()))
    return str(path)


def test_the_command_shows_full_and_given_lengths(config_file, capsys):
    arguments = ["plan", config_file, "--topology", "h100:4", "--estimate", "--lengths", "mean=3,sigma=1.0"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("response lengths", "longest reserved", "rows at once"))
    assert main([*arguments, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    asked = made["asked"]["at_lengths"]["reserved"]
    assert asked["seconds_per_step"] == pytest.approx(sum(asked["seconds"].values()))
    full = {phase["name"]: phase["seconds"] for phase in made["asked"]["phases"]}
    assert asked["seconds"]["update"] < full["update"]


def test_a_run_without_rollouts_ends_in_one_line(config_file, tmp_path, capsys):
    run = write_run(tmp_path / "run", [])
    assert main(["plan", config_file, "--topology", "h100:4", "--estimate", "--lengths", str(run)]) == 2
    error = capsys.readouterr().err
    assert "no rollouts" in error and error.count("\n") == 1
