"""Layouts: every token runs exactly once, rows stay in their budget, and sizes are few."""

import jax
import numpy as np
import pytest

from lpo_jax.models import packing

rng = np.random.default_rng(0)


def lengths(P, K, S, T, mean):
    """Ragged: prompts uniform, responses geometric."""
    return rng.integers(1, S + 1, P), np.minimum(rng.geometric(1 / mean, (P, K)), T)


def real_tokens(layout):
    return (layout.token != packing.NOWHERE).sum(axis=-1)  # [M, B]


def run_tokens(layout):
    """The tokens that run, with padding."""
    return layout.count * layout.token[0].size


@pytest.mark.parametrize("budget", [10**6, 200, 60, 1])
@pytest.mark.parametrize("shards", [1, 4])
def test_every_token_runs_once(budget, shards):
    P, K, S, T = 8, 4, 16, 32
    prompts, sizes = lengths(P, K, S, T, 8)
    sizes[2] = 0  # a prompt without a response to run does not run
    sizes[3, 1:] = 0
    layout = packing.plan_layout(prompts, sizes, S, T, budget, shards)
    assert layout.token.shape[1] == shards
    has_tokens = real_tokens(layout).any(axis=1)
    assert has_tokens[: layout.count].all() and not has_tokens[layout.count :].any()
    x = np.arange(1, P * K * T + 1).reshape(P, K, T)
    np.testing.assert_array_equal(layout.from_rows(layout.to_rows(x)), x * (np.arange(T) < sizes[..., None]))
    places = np.asarray(layout.token[layout.token != packing.NOWHERE])
    responses = places[places >= P * S] - P * S
    np.testing.assert_array_equal(np.sort(responses), np.flatnonzero(np.arange(T) < sizes[..., None]))
    assert set(places[places < P * S]) == {p * S + i for p in range(P) if p != 2 for i in range(prompts[p])}
    tokens = real_tokens(layout)
    assert layout.num_tokens == tokens.sum()
    assert tokens.max() <= max(budget, (prompts[:, None] + sizes).max())
    # Where whole groups fit, a prompt runs once, or again if that saves tokens.
    once, fits = prompts.sum() - prompts[2] + sizes.sum(), (prompts + sizes.sum(1)).max() <= budget
    whole = packing.plan_layout(prompts, sizes, S, T, budget, shards, exact=True)
    assert (real_tokens(whole).sum() == once) == fits
    assert tokens.sum() == real_tokens(whole).sum() or run_tokens(layout) < run_tokens(whole)
    size = packing.packed_size(prompts, sizes, S, T, budget, shards)
    assert (size.microbatches, size.tokens) == (layout.count, layout.token.shape[2])
    assert size.splits == (layout.prompt != packing.NOWHERE).sum()
    assert layout.unpack is None or layout.unpack.shape[2] == size.padded


def test_packing_and_unpacking_are_inverse():
    layout = packing.plan_layout(*lengths(6, 4, 16, 64, 8), 16, 64, 300)
    row = jax.tree.map(lambda x: x[0, 0], (layout.unpack, layout.pack))
    unpack, pack = row
    taken = pack != packing.NOWHERE
    np.testing.assert_array_equal(unpack[pack[taken]], np.flatnonzero(taken))
    assert (unpack != packing.NOWHERE).sum() == taken.sum()


def test_nothing_padded_costs_nothing():
    for P, K, S, T, budget in (
        (8, 8, 64, 64, 1280),
        (4, 16, 512, 64, 3072),
        (2, 4, 16, 16, 90),
        (6, 4, 10, 5, 65),
    ):
        layout = packing.full_layout(P, K, S, T, budget)
        M, B, C = layout.token.shape
        assert layout.pack is None and M * B * C == P * (S + K * T)
        assert layout.place.shape == (M, B, P * K * T // M)


def test_padding_is_small_and_shards_are_even():
    prompts, sizes = lengths(64, 8, 128, 512, 64)
    for shards in (1, 4):
        layout = packing.plan_layout(prompts, sizes, 128, 512, 4096, shards)
        tokens = real_tokens(layout)[: layout.count]
        assert tokens.sum() >= 0.85 * run_tokens(layout)
        assert tokens.min() >= 0.75 * tokens.max()


@pytest.mark.parametrize(
    "P, K, S, T, budget, pieces",
    [
        (4, 8, 64, 512, 4096, 8),  # eight responses are four and four, not seven and one
        (1, 8, 64, 1024, 4096, 4),  # four times two, not three, three and two
        (2, 3, 16, 100, 120, 6),  # one at a time
    ],
)
def test_groups_are_cut_evenly(P, K, S, T, budget, pieces):
    layout = packing.plan_layout(np.full(P, S), np.full((P, K), T), S, T, budget)
    tokens = real_tokens(layout)[: layout.count]
    assert tokens.size == pieces and layout.num_responses == P * K // pieces
    assert (tokens == layout.token.shape[-1]).all()


def test_one_long_response_does_not_blow_up_the_padded_form():
    sizes = np.full((32, 4), 4)
    sizes[0, 0] = 1024
    layout = packing.plan_layout(np.full(32, 8), sizes, 8, 1024, 2048)
    assert layout.prompt.shape[2] * (8 + 4 * 1024) <= packing.PADDED_BUDGETS * 2048


@pytest.mark.parametrize(
    "longest, padded", [(3, 16), (16, 16), (65, 128), (256, 256), (257, 300), (300, 300)]
)
def test_attention_is_padded_to_the_longest_response(longest, padded):
    S, T = 8, 300
    sizes = np.array([[longest, 2, 1], [1, 0, 2]])
    layout = packing.plan_layout(np.full(2, S), sizes, S, T, 10**6)
    assert layout.response_size == padded
    assert layout.unpack.shape[2] == 2 * (S + 3 * padded)


@pytest.mark.parametrize(
    "P, K, S, T, budget, shards, most",
    [
        (32, 16, 1024, 8192, 32768, 1, 1.25),  # a row has room for one group, or for smaller parts of several
        (64, 8, 256, 2048, 16384, 8, 1.25),
        (8, 8, 28, 16, 1280, 1, 1.13),
    ],
)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_little_padding_runs(P, K, S, T, budget, shards, most, share):
    """All responses, as in scoring, or groups with a signal, as in updates; lengths are log-normal."""
    run = once = 0
    for _ in range(20):
        prompts = rng.integers(S // 4, S, P)
        sizes = np.minimum(np.ceil(T / 5 * np.exp(rng.normal(size=(P, K)))), T).astype(int)
        sizes[rng.random(P) >= share] = 0
        size = packing.packed_size(prompts, sizes, S, T, budget, shards)
        run += size.microbatches * shards * size.tokens
        once += prompts[sizes.any(1)].sum() + sizes.sum()
    assert run <= most * once


def test_few_sizes():
    """Two hundred steps of a run whose responses double in length."""
    shapes = set()
    for mean in np.geomspace(32, 64, 200):
        layout = packing.plan_layout(*lengths(32, 8, 32, 512, mean), 32, 512, 4096)
        shapes.add((layout.response_size, *(np.shape(x) for x in jax.tree.leaves(layout))))
    assert len(shapes) <= 20


@pytest.mark.parametrize("P, K, S, T, budget", [(16, 8, 64, 16, 1280), (32, 8, 32, 512, 4096)])
@pytest.mark.parametrize("least, most_programs", [(1 / 8, 32), (1 / 2, 14)])
def test_few_sizes_for_any_number_of_responses(P, K, S, T, budget, least, most_programs):
    """A hundred updates with different numbers of groups that have a signal."""
    shapes = set()
    for share in np.linspace(least, 1, 100):
        prompts, sizes = lengths(P, K, S, T, T / 4)
        sizes[rng.permutation(P)[round(share * P) :]] = 0
        layout = packing.plan_layout(prompts, sizes, S, T, budget)
        shapes.add(
            (layout.num_responses, layout.response_size, *(np.shape(x) for x in jax.tree.leaves(layout)))
        )
        assert layout.num_tokens >= 0.75 * layout.count * layout.token.shape[-1]
    assert len(shapes) <= most_programs


def test_sizes_go_in_steps():
    sizes = (1, 16, 17, 128, 129, 1152, 1153, 4608)
    assert [packing.stepped(n) for n in sizes] == [16, 16, 32, 128, 144, 1152, 1280, 4608]
    assert [packing.stepped(n, 4) for n in (4097, 6144)] == [5120, 6144]


@pytest.mark.parametrize("K, S, T, budget", [(8, 4, 8, 1000), (8, 4, 8, 36), (7, 4, 8, 30), (3, 4, 8, 5)])
def test_full_groups_have_the_pieces_that_are_counted(K, S, T, budget):
    pieces = packing.full_layout(1, K, S, T, budget).prompt
    assert (pieces != packing.NOWHERE).sum() == packing.full_splits(K, S, T, budget)
