"""Test `lpo bench`: its FLOP and byte counts against manual counts, and every benchmark on the tiny model."""

import json

import jax
import numpy as np
import pytest
from tiny import CONFIG, random_params

from lpo_jax.bench import measure
from lpo_jax.bench.work import Shapes, Work
from lpo_jax.commands.main import main
from lpo_jax.reporting import read_metrics


def test_work_counts_every_weight_once_for_each_token():
    D, L, H, G, N, F, V = 32, 2, 4, 2, 8, 48, CONFIG.vocab_size
    P, K, S, T = 2, 3, 5, 7
    shapes = Shapes(P, K, S, T)
    work = Work.forward(CONFIG, shapes, shapes.lengths(), itemsize=4)
    layer = D * H * N + 2 * D * G * N + H * N * D + 3 * D * F
    assert work.product_flops == 2 * (L * layer * P * (S + K * T) + V * D * P * K * T)
    pairs = P * (S * S / 2 + K * (S * T + T * T / 2))
    assert work.attention_flops == 4 * L * H * N * pairs
    assert work.cache_bytes == 2 * L * G * N * P * (S + K * T) * 4
    reads = sum(P * (S + K * (t + 0.5)) for t in range(T))  # one term per step; half of the new token
    assert work.sampling_bytes == T * work.weight_bytes + 2 * L * G * N * reads * 4

    params = random_params(CONFIG)
    assert work.weight_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_uneven_lengths_are_geometric_and_an_eighth_of_the_longest():
    lengths = Shapes(64, 64, 8, 256, uneven=True).lengths()
    assert lengths.min() >= 1 and lengths.max() <= 256
    assert 28 < lengths.mean() < 36
    assert np.array_equal(lengths, Shapes(64, 64, 8, 256, uneven=True).lengths())


@pytest.mark.parametrize(
    "what", ["sample", *(pytest.param(x, marks=pytest.mark.slow) for x in ("train", "step"))]
)
def test_every_benchmark_prints_one_json_line(what, tiny_model, capsys, monkeypatch, no_plots):
    monkeypatch.setattr(measure, "WIDTH", 64)
    monkeypatch.setattr(measure, "COPIED", 1024)
    shapes = ["--prompts=2", "--responses=4", "--prompt-tokens=8", "--tokens=6", "--repeats=2"]
    assert (
        main(
            [
                "bench",
                what,
                f"--model={tiny_model}",
                *shapes,
                "--json",
                "--rewards.workers=1",
                "--mesh.devices=1",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["benchmark"] == what and len(result["all_seconds"]) == 2
    tokens = 2 * 4 * 6 + (2 * 8 if what == "train" else 0)
    assert result["tokens_per_s"] == pytest.approx(tokens / result["seconds"])
    assert result["of_floor"] == pytest.approx(result["floor_seconds"] / result["seconds"])
    assert result["model_flops"] > 0 and result["peak_memory_bytes"] > 0


@pytest.mark.slow
def test_groups_without_signal_do_not_run(tiny_model, no_plots):
    shapes = Shapes(4, 4, 8, 6, without_signal=0.75)
    overrides = ["--rewards.workers=1", "--mesh.devices=1"]
    with (
        measure.bench_session(str(tiny_model), shapes, 1, overrides) as session,
        measure.step_call(session) as run,
    ):
        run()
        row = read_metrics(session.config.output)[-1]
    assert row["lpo/degenerate_group_frac"] >= 0.75 and row["perf/signal_fraction"] <= 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--without-signal=1.5"], "from 0 to 1"),
        (["train", "--without-signal=0.5"], "of the groups of a step"),
        (["sample", "--tokens=0"], "at least 1"),
        (["step", "--uneven"], "requires sample or train"),
        (["train", "--training.tokens=3"], "unknown key"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, message, tiny_model, capsys):
    assert main(["bench", *arguments, f"--model={tiny_model}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
