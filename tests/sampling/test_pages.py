"""Admission by pages: no page is lost or used twice, the oldest rows come first, and every row reaches its end."""

import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.sampling.pages import Admission, Pool

K = 4
CALL = 16  # tokens between two schedules


def check(admission, remaining, lengths):
    """What holds after every change."""
    pool, active = admission.pool, admission.active
    used = [
        page
        for x in (admission.pages_of, admission.prompt_pages_of)
        for pages in x.values()
        for page in pages
    ]
    assert sorted(used + admission._free) == list(range(pool.pages))  # no page is lost, none is used twice
    assert len(set(admission.slot_of.values())) == len(active) <= pool.slots
    assert len(set(admission.entry_of.values())) == len(admission.entry_of) <= pool.prompts
    assert set(admission.slot_of) == set(admission.pages_of) == set(active)
    assert set(admission.entry_of) == set(admission.prompt_pages_of) >= {row // K for row in active}
    assert [*active, *admission.queue] == remaining  # the active rows are the first ones of those that remain
    for row in active:
        assert len(admission.pages_of[row]) >= pool.pages_of(lengths[row])
    for prompt, pages in admission.prompt_pages_of.items():
        assert len(pages) == pool.pages_of(admission._prompt_tokens[prompt])


def test_no_page_is_lost_or_used_twice():
    """10,000 random admissions, ends and preemptions, with pools from the smallest possible to ample ones."""
    rng = np.random.default_rng(0)
    entered = set_aside = ended = 0
    while entered + set_aside + ended < 10_000:
        P, X = int(rng.integers(1, 30)), int(rng.choice([1, 4, 16]))
        prompt_tokens = rng.integers(0, 40, P)
        final = np.minimum(np.exp(rng.normal(3, 1, P * K)).astype(int) + 1, 160)
        least = -(-int(prompt_tokens.max()) // X) - (-160 // X)
        slots, prompts = (int(n) for n in rng.integers(1, 40, 2))
        pages = least + int(rng.integers(0, 2 * least))
        pool = Pool(pages, X, slots, prompts, headroom=int(rng.integers(0, 1 + pages // 8)))
        pool.check(int(prompt_tokens.max()) + 1, 160)
        remaining, lengths = list(range(P * K)), np.zeros(P * K, int)
        admission = Admission(pool, remaining, K, prompt_tokens)
        while remaining:
            oldest = admission.active[:1]
            moves = admission.schedule(np.minimum(lengths + CALL, final))
            check(admission, remaining, np.minimum(lengths + CALL, final))
            assert admission.active and oldest in ([], admission.active[:1])
            entered, set_aside = entered + len(moves.entered), set_aside + len(moves.set_aside)
            for row in list(admission.active):
                lengths[row] = min(lengths[row] + int(rng.integers(1, CALL + 1)), final[row])
                if lengths[row] == final[row]:
                    admission.end(row)
                    remaining.remove(row)
                    ended += 1
                    check(admission, remaining, lengths)
        assert admission.free_pages == pool.pages and not admission.prompt_pages_of
    assert set_aside > 500


def test_a_prompt_is_counted_once_for_its_rows():
    admission = Admission(Pool(16, 4, 8, 2), range(8), K, np.array([9, 9]))
    moves = admission.schedule(np.full(8, 4))
    assert moves.entered == list(range(8)) and moves.prompts == [0, 1]
    assert admission.free_pages == 16 - 2 * 3 - 8


def test_the_youngest_rows_are_set_aside_and_enter_again_first():
    admission = Admission(Pool(6, 4, 8, 2), range(8), K, np.array([4, 4]))
    assert admission.schedule(np.full(8, 4)).entered == [0, 1, 2, 3]  # of the second prompt none fits
    moves = admission.schedule(np.full(8, 8))
    assert moves.set_aside == [3, 2] and not moves.entered and list(admission.queue) == [2, 3, 4, 5, 6, 7]
    admission.end(0)
    assert admission.schedule(np.full(8, 8)).entered == [2]


def test_a_pool_holds_at_least_one_row():
    pool = Pool(10, 16, 4, 1)
    pool.check(33, 128)
    with pytest.raises(UserError, match=r"^sampling.kv_tokens: 10 pages of 16 tokens .* needs 11; raise it"):
        pool.check(34, 128)


def test_sizes_of_the_pool():
    """By default all rows fit at full length; `kv_tokens` bounds the pages and leaves the slots."""
    assert Pool.of(8, 4, 257, 1024, 0, 0, 2) == Pool(4 * 2 + 16 * 8, 128, 16, 4)
    assert Pool.of(8, 4, 257, 1024, 8, 0, 2) == Pool(4 * 2 + 4 * 8, 128, 4, 4)
    assert Pool.of(8, 4, 257, 1024, 8, 2 * 32 * 128 + 255, 2) == Pool(32, 128, 4, 4, headroom=2)
    assert Pool.of(8, 4, 257, 1024, 8, 10**9, 2) == Pool(4 * 2 + 4 * 8, 128, 4, 4)


def test_several_times_as_many_rows_in_the_same_memory():
    """Log-normal lengths of mean 1/4 of the limit, against a cache in which every row has the limit."""
    P, K, S, T = 64, 16, 513, 4096
    final = np.random.default_rng(0).lognormal(np.log(T / 4) - 0.5, 1, P * K).astype(int).clip(1, T)
    # What 16 rows took: a quarter more than the longest response, and the prompts of four times as many rows.
    memory = 16 * (T + T // 4) + 4 * S
    pool = Pool.of(P, K, S, T, 80, memory, 1)
    admission, lengths = Admission(pool, range(P * K), K, np.full(P, S - 1)), np.zeros(P * K, int)
    active, set_aside = [], 0
    while admission.active or admission.queue:
        set_aside += len(admission.schedule(np.minimum(lengths + CALL, final)).set_aside)
        active += [len(admission.active)] * bool(admission.queue)
        for row in list(admission.active):
            lengths[row] = min(lengths[row] + CALL, final[row])
            if lengths[row] == final[row]:
                admission.end(row)
    assert np.mean(active) >= 3 * 16
    assert set_aside < P * K / 10
