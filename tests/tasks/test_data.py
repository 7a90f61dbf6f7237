import json

import pytest

from lpo_jax import tasks
from lpo_jax.errors import UserError
from lpo_jax.tasks.data import plain

ROWS = [{"n": n} for n in range(10)]


def indices(iterator, batches):
    return [[index for index, _ in next(iterator)] for _ in range(batches)]


def test_two_batches_and_a_resume_equal_four():
    whole = tasks.PromptIterator(ROWS, prompts=3, seed=5)
    expected = [next(whole) for _ in range(8)]
    for stop in range(8):
        first = tasks.PromptIterator(ROWS, prompts=3, seed=5)
        before = [next(first) for _ in range(stop)]
        state = json.loads(json.dumps(first.state()))
        second = tasks.PromptIterator(ROWS, prompts=3, seed=5)
        second.restore(state)
        assert before + [next(second) for _ in range(8 - stop)] == expected
        assert second.state() == whole.state()


@pytest.mark.parametrize(("taught", "asked"), [(3, 3), (2, 4), (5, 2)])
def test_backward_ends_where_forward_begins(taught, asked):
    """For any two batch sizes, the first prompts of RL include no rows that were taught before it."""
    rows = [{"n": n} for n in range(23)]
    for seed in range(5):
        supervised = tasks.PromptIterator(rows, prompts=taught, seed=seed, backward=True)
        prompts = tasks.PromptIterator(rows, prompts=asked, seed=seed)
        seen = {i for batch in indices(supervised, 2) for i in batch}
        assert len(seen) == 2 * taught
        first = {i for batch in indices(prompts, (23 - len(seen)) // asked) for i in batch}
        assert len(first) == (23 - len(seen)) // asked * asked and not seen & first


def test_backward_is_the_reverse_of_every_epoch_and_another_order_to_resume():
    forward = tasks.PromptIterator(ROWS, prompts=10, seed=5)
    backward = tasks.PromptIterator(ROWS, prompts=10, seed=5, backward=True)
    assert [batch[::-1] for batch in indices(backward, 3)] == indices(forward, 3)
    with pytest.raises(UserError, match="order was None, is 'backward'"):
        backward.restore(forward.state())


def test_rows_come_with_their_index():
    for batch in (next(tasks.PromptIterator(ROWS, prompts=4, seed=seed)) for seed in range(3)):
        assert all(row is ROWS[index] and type(index) is int for index, row in batch)


def test_an_epoch_has_no_row_twice_and_each_epoch_another_order():
    iterator = tasks.PromptIterator(ROWS, prompts=3, seed=5)
    epochs = [[i for batch in indices(iterator, 3) for i in batch] for _ in range(4)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert iterator.epoch == 4.0


def test_a_batch_may_be_the_whole_set():
    iterator = tasks.PromptIterator(ROWS, prompts=10, seed=0)
    assert all(sorted(batch) == list(range(10)) for batch in indices(iterator, 3))


def test_order_depends_on_the_seed_alone():
    def run(seed):
        return indices(tasks.PromptIterator(ROWS, prompts=5, seed=seed), 4)

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("prompts", [0, 11])
def test_a_batch_larger_than_the_data_is_refused(prompts):
    with pytest.raises(UserError, match=f"{prompts} prompts per step from 10 training rows"):
        tasks.PromptIterator(ROWS, prompts=prompts, seed=0)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"prompts": 2}, "prompts was 3, is 2"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"rows": ROWS[:9]}, "rows was 10, is 9"),
        ({"data_hash": "b"}, r"data_hash was 'a', is 'b' \(the task's rows\)"),
        (
            {"prompts_hash": "d"},
            r"prompts_hash was 'c', is 'd' \(the prompts, which depend on the task, the chat",
        ),
    ],
)
def test_a_resume_over_something_else_is_refused(changed, difference):
    setup = {"rows": ROWS, "prompts": 3, "seed": 0, "data_hash": "a", "prompts_hash": "c"}
    state = tasks.PromptIterator(**setup).state()
    with pytest.raises(UserError, match=difference):
        tasks.PromptIterator(**setup | changed).restore(state)


def test_a_state_without_a_hash_of_the_prompts_is_of_an_older_version():
    setup = {"rows": ROWS, "prompts": 3, "seed": 0, "data_hash": "a", "prompts_hash": "c"}
    state = tasks.PromptIterator(**setup).state()
    del state["prompts_hash"]
    tasks.PromptIterator(**setup).restore(state)


def test_content_hash_sees_every_change_but_not_key_order():
    rows = [{"a": 1, "b": [1, 2]}, {"a": 2, "b": []}]
    same = tasks.content_hash([{"b": [1, 2], "a": 1}, {"a": 2, "b": []}], [])
    assert tasks.content_hash(rows, []) == same
    others = [
        tasks.content_hash(rows[::-1], []),
        tasks.content_hash([], rows),
        tasks.content_hash(rows[:1], rows[1:]),
        tasks.content_hash(rows[:1], []),
        tasks.content_hash([{"a": 1, "b": [2, 1]}, rows[1]], []),
        tasks.content_hash([{"a": "1", "b": [1, 2]}, rows[1]], []),
    ]
    assert len({same, *others}) == 7


def test_plain():
    import numpy as np

    row = {
        "n": np.int64(3),
        "x": np.array([[1.5]]),
        "t": (b"\xc3\xa9", np.bool_(True)),
        "s": "s",
        "none": None,
    }
    assert json.dumps(plain(row)) == '{"n": 3, "x": [[1.5]], "t": ["\\u00e9", true], "s": "s", "none": null}'
