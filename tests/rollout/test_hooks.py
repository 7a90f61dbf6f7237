"""Hooks on rounds made by hand: what they sample, which groups they replace, and what they give the objective."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import EXACT, in_float64
from tiny import character_tokenizer

from lpo_jax import objectives as O
from lpo_jax.errors import RunStopped, UserError
from lpo_jax.models.runner import Groups, ModelRunner, score
from lpo_jax.objectives import Scored, hook_specs
from lpo_jax.rewards import Verdict
from lpo_jax.rollout.batch import Batch
from lpo_jax.rollout.collect import Rollouts, concatenate, replace_response
from lpo_jax.rollout.encode import encode_hinted
from lpo_jax.rollout.hooks import credits, hints, judges, prompts, replay, teachers
from lpo_jax.rollout.hooks.base import judged
from lpo_jax.rollout.rounds import clusters, make_batch
from lpo_jax.sampling import Responses
from lpo_jax.tasks.task import Task

TOKENIZER = character_tokenizer()


def verdict(reward):
    """A verdict that passes at reward 1; None stands for a failed verifier."""
    if reward is None:
        return Verdict(0.0, "infrastructure")
    return Verdict(reward, "pass" if reward >= 1 else "wrong", {"answer": f"{reward:g}"})


def collected(ids, rewards, texts=None, T=6):
    """A batch with the prompts "p<id>" and the given responses (by default "r<k>")."""
    texts = texts or [[f"r{k}"[:T] for k in range(len(group))] for group in rewards]
    P, K = len(rewards), len(rewards[0])
    tokens, lengths = np.zeros((P, K, T), np.int32), np.zeros((P, K), np.int32)
    for p, k in np.ndindex(P, K):
        encoded = TOKENIZER.encode(texts[p][k])
        tokens[p, k, : len(encoded)], lengths[p, k] = encoded, len(encoded)
    asked = [TOKENIZER.encode(f"p{i}") for i in ids]
    padded = np.array([row + [0] * (8 - len(row)) for row in asked], np.int32)
    logp = np.where(np.arange(T) < lengths[..., None], -0.5, 0).astype(np.float32)
    return Rollouts(
        ids=list(ids),
        golds=[f"g{i}" for i in ids],
        prompt_texts=[f"p{i}" for i in ids],
        images=[[] for _ in ids],
        patches=[() for _ in ids],
        prompts=padded,
        prompt_lengths=np.array([len(row) for row in asked], np.int32),
        responses=Responses(
            tokens, logp, np.abs(logp), tokens > 0, lengths, np.ones((P, K), bool), lengths.astype(np.float32)
        ),
        texts=texts,
        verdicts=[[verdict(r) for r in group] for group in rewards],
        seconds_sampling=1.0,
        seconds_verifying=0.5,
    )


def environment(rows, updates=1, **options):
    """A stand-in for an environment, with the attributes that hooks use."""
    task = Task("made", rows, [], lambda row: f"p{row['n']}", None, lambda row: row.get("solution"))
    task = dataclasses.replace(task, verifier=types.SimpleNamespace(prefill=""))
    config = types.SimpleNamespace(
        seed=3,
        sampling=types.SimpleNamespace(max_tokens=6, max_prompt_tokens=16, num_responses=2),
        training=types.SimpleNamespace(updates_per_step=updates),
    )
    collect = types.SimpleNamespace(text=TOKENIZER.decode)
    options = {
        "task": task,
        "train_rows": rows,
        "tokenizer": TOKENIZER,
        "collect": collect,
        "config": config,
    } | options
    return types.SimpleNamespace(**options)


def written(ids):
    """Decode token ids; "|" stands for unknown characters (line ends, colons, capitals)."""
    return TOKENIZER.decode(ids).replace("<unk>", "|")


class Tools:
    """Return the given batches from successive calls of `sample`, and record the arguments of the calls."""

    def __init__(self, environment, *answers, step=100):
        self.environment, self.answers, self.calls, self.step = environment, list(answers), [], step

    def sample(self, rows, **options):
        self.calls.append((rows, options))
        answer = self.answers.pop(0)
        assert [row for row, _ in rows] == answer.ids
        return answer

    def rows_of(self, batch):
        return [self.environment.train_rows[i] for i in batch.ids]


ROWS = [{"n": n, "solution": f"{n}" * 4, "hints": ["a", "b"]} for n in range(12)]


def test_concatenate_takes_and_replaces_whole_records():
    one, two = collected([0, 1], [[0, 1], [1, 0]]), collected([7], [[1, 1]], [["longer text", "x"]], T=11)
    both = concatenate([one, two])
    assert both.ids == [0, 1, 7] and both.responses.tokens.shape == (3, 2, 11)
    assert both.take([2, 0]).records() == two.records() + one.take([0]).records()
    put = replace_response(one, 1, 1, two, 0, 0)
    assert put.texts[1] == ["r0", "longer text"] and put.rewards.tolist() == [[0, 1], [1, 1]]
    assert TOKENIZER.decode(put.responses.ids(1, 1)) == "longer text"
    assert put.responses.mask[1, 1].sum() == 11 and put.prompt_texts == one.prompt_texts
    assert put.take([0]).records() == one.take([0]).records() and one.texts[1] == ["r0", "r1"]


def test_clusters_number_equal_answers():
    batch = collected([0], [[0.5, 1, 0.5, None]])
    assert clusters(batch).tolist() == [[0, 1, 0, -1]]


def dynamic(first, *further, max_rounds=3, updates=1):
    """Run dynamic sampling on batches (None: no new prompt is left); returns the kept groups and the hook."""
    hook = prompts.Dynamic(hook_specs.DynamicSampling(max_rounds), environment(ROWS, updates=updates), None)
    offered = iter(further)
    return hook.select(first, lambda: next(offered)), hook


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ():
    first = collected([0, 1, 2], [[1, 1], [0, 1], [0, 0]])
    second = collected([3, 4], [[0.5, 0.5], [1, None]])  # one valid response: no signal
    third = collected([5, 6, 7], [[0, 1], [1, 0], [0, 1]])
    kept, hook = dynamic(first, second, third)
    assert kept.ids == [1, 5, 6]
    assert hook.metrics() == {"lpo/sampling_rounds": 3, "lpo/useful_group_frac": 1.0}


def test_dynamic_sampling_ends_and_fills_up_with_what_there_is():
    kept, hook = dynamic(collected([0, 1], [[1, 1], [0, 1]]), collected([3], [[0, 0]]), None)
    assert kept.ids == [1, 0]
    assert hook.metrics() == {"lpo/sampling_rounds": 2, "lpo/useful_group_frac": 0.5}


@pytest.mark.parametrize(
    ("updates", "mixed", "kept"),
    [
        (2, [4, 5], [4, 0, 2, 5, 1, 3]),  # each half gets one group with a signal
        (3, [4, 5], [4, 0, 5, 1, 4, 2]),  # fewer groups with a signal than updates: they are repeated
        (2, [1, 3, 5], [1, 5, 2, 3, 0, 4]),
        (2, [], [0, 1, 2, 3, 4, 5]),  # no group has a signal
    ],
)
def test_what_dynamic_sampling_could_not_fill_is_spread_over_the_updates(updates, mixed, kept):
    batch = collected(range(6), [[0, 1] if i in mixed else [0, 0] for i in range(6)])
    found, hook = dynamic(batch, max_rounds=1, updates=updates)
    assert found.ids == kept and hook.kept == len(mixed) / 6
    minibatches = np.split(judged(found).mixed, updates)
    assert not mixed or all(part.any() for part in minibatches)


def test_groups_that_could_not_be_judged_fill_up_last():
    kept, _ = dynamic(collected([0, 1, 2, 3], [[None, None], [0, 0], [None, 1], [0, 1]]), max_rounds=1)
    assert kept.ids == [3, 1, 2, 0]


def test_dynamic_sampling_of_groups_of_one_is_refused():
    single = environment(ROWS)
    single.config.sampling.num_responses = 1
    with pytest.raises(UserError, match="num_responses = 1: dynamic-sampling"):
        prompts.Dynamic(hook_specs.DynamicSampling(), single, None)


def test_failures_of_the_verifier_are_neither_passes_nor_failures():
    outcomes = judged(collected(range(5), [[None, None], [None, 0], [1, None], [0.5, 0], [1, 0]]))
    assert outcomes.known.tolist() == [False, True, True, True, True]
    np.testing.assert_array_equal(outcomes.pass_rate, [np.nan, 0, 1, 0, 0.5])
    np.testing.assert_array_equal(outcomes.mean_reward, [np.nan, 0, 1, 0.25, 0.5])
    assert outcomes.failed.tolist() == [False, True, False, True, False]
    assert outcomes.mixed.tolist() == [False, False, False, True, True]
    assert outcomes.rewards.tolist() == [0, 1, 0.5, 0, 1, 0]


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (prompts.Learnability, hook_specs.LearnabilitySampling()),
        (prompts.Gaussian, hook_specs.GaussianSampling()),
    ],
)
def test_a_prompt_that_could_not_be_judged_keeps_its_pass_rate(make, spec):
    hook = make(spec, environment(ROWS), None)
    hook.observe(collected([0, 1, 2], [[1, 0], [1, 1], [0, None]]))
    before = dict(hook.rates)
    hook.observe(collected([0, 3], [[None, None], [None, None]]))
    assert hook.rates == before  # no rate is changed, and none added for a prompt without verdicts
    assert before[2] == pytest.approx(spec.rate_momentum * 0.5)  # from its one judged response


def test_prompts_are_drawn_by_their_pass_rates():
    """Learnability sampling prefers p = 1/2, takes a share of prompts in data order, and never repeats a prompt."""
    rows = [{"n": n} for n in range(12)]
    hook = prompts.Learnability(hook_specs.LearnabilitySampling(uniform_share=0.5), environment(rows), None)
    rates = [0, 1, 0.5, 0.5, *[0.01] * 8]
    for i, rate in enumerate(rates):
        hook.observe(collected([i], [[float(k < 100 * rate) for k in range(100)]]))
    given = [(i, rows[i]) for i in (8, 9, 10, 11)]
    drawn = [[i for i, _ in hook.draw(given, step, ())] for step in range(200)]
    assert all(d[:2] == [8, 9] and len(set(d)) == 4 for d in drawn)
    counts = np.bincount(np.concatenate([d[2:] for d in drawn]), minlength=12) / 200
    assert counts[2] > 0.8 and counts[3] > 0.8 and counts[0] == counts[1] == 0
    other = prompts.Learnability(hook.spec, hook.environment, None)
    other.restore(hook.state())
    assert [i for i, _ in other.draw(given, 5, ())] == drawn[5]


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (prompts.Learnability, hook_specs.LearnabilitySampling()),
        (prompts.Gaussian, hook_specs.GaussianSampling()),
    ],
)
def test_further_rounds_of_a_step_draw_prompts_that_it_has_not_seen(make, spec):
    hook = make(spec, environment(ROWS), None)
    order, seen = np.random.default_rng(0).permutation(12), []
    for start in (0, 4, 8, 0):
        offered = [(int(i), ROWS[i]) for i in order[start : start + 4]]
        drawn = [i for i, _ in hook.draw(offered, 7, seen)]
        assert len(drawn) == len(set(drawn)) == min(4, 12 - len(seen)) and not set(drawn) & set(seen)
        seen += drawn
    assert sorted(seen) == list(range(12))


def test_gaussian_sampling_peaks_at_one_half_and_flattens_with_its_width():
    hook = prompts.Gaussian(hook_specs.GaussianSampling(), environment(ROWS), None)
    rates = np.linspace(0, 1, 11)
    weights = hook.weights(rates)
    assert weights.argmax() == 5 and np.allclose(weights, weights[::-1])
    np.testing.assert_allclose(weights[0] / weights[5], np.exp(-0.25 / (2 * 0.35**2)))
    wide = prompts.Gaussian(hook_specs.GaussianSampling(width=1e3), environment(ROWS), None)
    np.testing.assert_allclose(wide.weights(rates), 1, rtol=1e-5)
    hook.observe(collected([4], [[1, 1]]))
    assert hook.rates[4] == pytest.approx(0.9 * 0.5 + 0.1 * 1)


def test_solution_hints_grow_until_something_passes():
    tools = Tools(environment(ROWS), collected([1, 2], [[0, 1], [0, 0]]), collected([2], [[1, 1]]))
    hook = hints.Solutions(hook_specs.SolutionHints((0.25, 0.75)), tools.environment, None)
    rollouts = collected([0, 1, 2], [[1, 0], [0, 0], [0, None]])
    hook.begin()
    rollouts = hook.mend(rollouts, tools)
    assert rollouts.ids == [0, 1, 2] and rollouts.rewards.tolist() == [[1, 0], [0, 1], [1, 1]]
    assert hook.metrics() == {"lpo/hinted_groups": 2} and not rollouts.rescore
    asked = [
        [written(ids).partition("begins| ")[2].strip("|") for ids in o["prompts"]] for _, o in tools.calls
    ]
    assert asked == [["1", "2"], ["222"]]
    assert tools.calls[0][1]["stream"] != tools.calls[1][1]["stream"]


def test_ladder_hints_put_one_response_under_the_plain_prompt():
    tools = Tools(environment(ROWS), collected([1], [[0, 0]]), collected([1], [[0, 1]], [["no", "yes"]]))
    hook = hints.Ladder(hook_specs.LadderHints(hint_after=50), tools.environment, None)
    rollouts = collected([0, 1], [[1, 0], [0, 0]])
    hook.begin()
    rollouts = hook.mend(rollouts, tools)
    assert rollouts.texts[1] == ["yes", "r1"] and rollouts.rewards[1].tolist() == [1, 0]
    assert rollouts.prompt_texts == ["p0", "p1"] and rollouts.rescore
    early = Tools(tools.environment, step=50)
    hook.begin()
    hook.mend(collected([0], [[0, 0]]), early)
    assert early.calls == [] and hook.metrics() == {"lpo/hinted_groups": 0}


@pytest.mark.parametrize(
    ("make", "spec"),
    [(hints.Solutions, hook_specs.SolutionHints((0.25, 0.75))), (hints.Ladder, hook_specs.LadderHints(0))],
)
def test_hints_are_for_groups_that_were_judged_to_fail(make, spec):
    """Group 0 has no verdicts. Group 2 could not be judged with a hint, so it does not get a longer hint."""
    answers = collected([1, 2], [[0, 0], [None, None]]), collected([1], [[None, 1]])
    tools = Tools(environment(ROWS), *answers)
    hook = make(spec, tools.environment, None)
    rollouts = collected([0, 1, 2], [[None, None], [0, None], [0, 0]])
    hook.begin()
    rollouts = hook.mend(rollouts, tools)
    assert [[i for i, _ in rows] for rows, _ in tools.calls] == [[1, 2], [1]]
    assert hook.metrics() == {"lpo/hinted_groups": 1}
    assert not rollouts.valid[0].any() and rollouts.rewards[2].tolist() == [0, 0]
    # The hinted response replaces the one that could not be judged, not the one that failed.
    assert rollouts.passed[1].tolist() == [False, True]


def test_hints_that_rows_do_not_have_are_refused():
    rows = [{"n": 0, "solution": "x", "hints": ["a"]}, {"n": 1}]
    for make, spec in (
        (hints.Ladder, hook_specs.LadderHints()),
        (hints.Solutions, hook_specs.SolutionHints()),
    ):
        with pytest.raises(UserError, match="training row 1 of task 'made' has no"):
            make(spec, environment(rows), O.get("grpo"))


def test_a_hint_goes_between_question_and_prefill():
    task = environment(ROWS).task
    raw = dataclasses.replace(
        task, prompt=lambda row: "ask\nso= ", verifier=types.SimpleNamespace(prefill="so= ")
    )
    assert written(encode_hinted(raw, TOKENIZER, {}, "hint")) == "ask|hint|so= "


def test_greedy_baseline_is_the_greedy_reward_or_the_groups_mean():
    batch = collected([0, 1], [[1, 0], [0, 1]])
    tools = Tools(environment(ROWS), collected([0, 1], [[0.25], [None]]))
    out = judges.Greedy(hook_specs.GreedyBaseline(), tools.environment, None).annotate(None, batch, tools)
    assert out["baseline"].tolist() == [[0.25], [0.5]]
    asked = tools.calls[0][1]
    assert asked.pop("prompts") == [TOKENIZER.encode("p0"), TOKENIZER.encode("p1")]
    assert asked == {"num_responses": 1, "greedy": True}
    unknown = collected([0, 1], [[None, None], [0, None]])
    tools = Tools(environment(ROWS), collected([0, 1], [[None], [None]]))
    out = judges.Greedy(hook_specs.GreedyBaseline(), tools.environment, None).annotate(None, unknown, tools)
    assert out["baseline"].tolist() == [
        [0],
        [0],
    ]  # a masked group without verdicts, and one with a single failure


@pytest.fixture
def judge_file(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(
        "from lpo_jax.rewards import Verdict\n"
        "def flawed(response, row):\n    return response == 'bad'\n"
        "def steps(response, row):\n    return Verdict(1.0, 'wrong', {'wrong': '1:3' if response == 'worse' else ''})\n"
    )
    return path


def judging(make, spec, batch):
    environment_ = environment(ROWS)
    environment_.config.rewards = types.SimpleNamespace(workers=1, timeout=10.0)
    rollouts = make_batch(batch, 6, 0.0)
    with make(spec, environment_, O.get("grpo")) as hook:
        return hook.annotate(rollouts, batch, Tools(environment_))


def test_judge_marks_passing_responses_and_steps(judge_file):
    batch = collected([0, 1], [[1, 1], [0, 0]], [["bad", "good"], ["bad", "worse"]])
    flawed = judging(judges.FlawJudge, hook_specs.Judge(f"{judge_file}:flawed"), batch)["flawed"]
    assert flawed.tolist() == [[True, False], [False, False]]  # failed responses are not judged
    credit = judging(credits.StepCredits, hook_specs.StepJudge(f"{judge_file}:steps"), batch)["credit"]
    assert credit[1, 1].tolist()[:6] == [0, 1, 1, 0, 0, 0] and credit.sum() == 2
    with pytest.raises(UserError, match=r"needs a judge: set objective\.judge"):
        judges.FlawJudge(hook_specs.Judge(), environment(ROWS), O.get("grpo"))


def test_progress_is_the_gain_in_the_chance_of_the_solution(tiny_config, tiny_params):
    batch = collected([0, 3], [[1, 0], [0, 1]], [["abcdef", "a"], ["abc", "xy"]])
    rollouts = make_batch(batch, 6, 0.0)
    runner = ModelRunner(tiny_config)
    tools = Tools(environment(ROWS))
    tools.runner, tools.params = runner, tiny_params
    got = credits.Values(hook_specs.PrefixValues(segments=2, cue="="), tools.environment, None).annotate(
        rollouts, batch, tools
    )

    def chance(text, solution):
        ids, target = np.array([TOKENIZER.encode(text)]), np.array([[TOKENIZER.encode(solution)]])
        return float(np.exp(score(runner, tiny_params, Groups(ids, np.array([ids.size]), target)).logp.sum()))

    start, middle, end = (chance(f"p0{text}=", "0000") for text in ("", "abc", "abcdef"))
    want = [middle - start] * 3 + [end - middle] * 3
    np.testing.assert_allclose(got["credit"][0, 0, :6], want, rtol=1e-4, atol=1e-9)


def test_cuts_hold_the_mean_reward_of_their_answers():
    batch = collected([0, 3], [[1, 0], [0, 1]], [["abcdef", "a"], ["abcd", "xy"]])
    rollouts = make_batch(batch, 6, 0.0)
    first = collected([0 + (1 << 24), 3 + (1 << 24)], [[1, 0], [None, None]])  # those longer than 3 tokens
    tools = Tools(environment(ROWS), first)
    got = credits.Cuts(hook_specs.Budgets(budgets=2, summaries=2, cue="="), tools.environment, None).annotate(
        rollouts, batch, tools
    )["credit"]
    assert got[0, 0, :6].tolist() == [0.5] * 3 + [1] * 3  # the answers' mean, then the reward
    assert got[0, 1, :6].tolist() == [0] * 6 and got[1, 1, :6].tolist() == [1] * 6
    assert got[1, 0, :6].tolist() == [0] * 6  # its answers could not be judged
    rows, options = tools.calls[0]
    assert options["written"] == ["abc=", "abc="] and options["max_tokens"] == 64
    assert [TOKENIZER.decode(ids) for ids in options["prompts"]] == ["p0abc=", "p3abc="]


@in_float64
def test_siblings_teach_the_failed_responses_of_mixed_groups(tiny_config, tiny_params):
    batch = collected([0, 1, 2], [[1, 0], [0, 0], [1, None]])
    rollouts = make_batch(batch, 6, 0.0)
    tools = Tools(environment(ROWS))
    tools.runner, tools.params = ModelRunner(tiny_config, 0.7, dtype=jnp.float64), tiny_params
    spec = hook_specs.SiblingTeacher(top=4, reprompt="see {solution}:")
    teacher = teachers.Sibling(spec, tools.environment, None).annotate(rollouts, batch, tools)["teacher"]
    assert np.asarray(teacher.valid).tolist() == [[False, True], [False, False], [False, False]]
    ids = encode_hinted(tools.environment.task, TOKENIZER, ROWS[0], "see r0:")
    groups = Groups(np.array([ids]), np.array([len(ids)]), rollouts.groups.responses[:1], teacher.ids[:1])
    want = score(tools.runner, tiny_params, groups).top_logp
    np.testing.assert_allclose(teacher.logp[:1], want, atol=EXACT)


def test_replay_weighs_the_batch_before_and_survives_a_resume():
    make = lambda: replay.PreviousBatch(hook_specs.Replay(window=3), environment(ROWS), None)  # noqa: E731
    hook, means, weights = make(), [0.0, 0.5, 0.25, 1.0, 0.0, 1.0], []
    for step, mean in enumerate(means):
        batch = collected([step], [[mean, mean]])
        hook.observe(batch)
        weights.append(hook.metrics()["lpo/replay_weight"])
        rollouts = make_batch(batch, 6, step / 5)
        again = hook.replay(rollouts)
        assert (again is None) == (weights[-1] == 0)
        if again is not None:
            np.testing.assert_array_equal(again.scored.rewards, means[step - 1])
            np.testing.assert_allclose(again.scored.weight, weights[-1], rtol=1e-6)
            assert again.scored.progress == rollouts.scored.progress
        hook, before = make(), hook
        hook.restore(before.state())
        jax.tree.map(np.testing.assert_array_equal, hook.before.groups, before.before.groups)
        np.testing.assert_array_equal(hook.before.scored.behaviour_logp, before.before.scored.behaviour_logp)
    past = np.array(means[1:4])
    assert weights[4] == pytest.approx(
        0.1 * (0 - past.mean()) / past.std(), rel=1e-5
    )  # a fall gets a tenth of the weight
    assert weights[3] == pytest.approx((1 - 0.25) / np.array(means[:3]).std(), rel=1e-5)


def test_replay_weight_does_not_explode_where_the_window_is_constant():
    hook = replay.PreviousBatch(hook_specs.Replay(window=8), environment(ROWS), None)
    for _ in range(3):
        hook.observe(collected([0], [[1, 0, 0, 0]]))
        assert hook.weight == 0
    hook.observe(collected([0], [[1, 1, 0, 0]]))  # an increase of 0.25, with an uncertainty of 0.25
    assert hook.weight == pytest.approx(1.0)
    hook.rewards = [0.0] * 8
    hook.observe(collected([0], [[1, 1, 1, 1]]))  # neither the window nor the batch has any spread
    assert hook.weight == 0


def test_replayed_batch_survives_a_resume_whole():
    """A replayed batch keeps its rescored log-probs and its teacher."""
    rollouts = make_batch(collected([0, 1], [[1, 0], [0, 0]]), 6, 0.5)
    scored = rollouts.scored
    teacher = O.Teacher(
        *(np.full((2, 2, 6, 3), x) for x in (1, 2.0)), np.ones((2, 2, 6)), np.ones((2, 2), bool)
    )
    extra = {"sampler_logp": scored.behaviour_logp + 1, "prompt_confidence": np.ones(2), "teacher": teacher}
    hook, again = (replay.PreviousBatch(hook_specs.Replay(), environment(ROWS), None) for _ in range(2))
    hook.replay(rollouts.replace(scored=scored.replace(**extra, credit=scored.behaviour_logp)))
    again.restore(json.loads(json.dumps(hook.state())))
    assert jax.tree.structure(again.before) == jax.tree.structure(hook.before)
    jax.tree.map(np.testing.assert_array_equal, again.before, hook.before)


def test_a_step_that_could_not_be_judged_is_no_regress():
    hook = replay.PreviousBatch(hook_specs.Replay(window=3), environment(ROWS), None)
    steps = [
        collected([i], [rewards])
        for i, rewards in enumerate(([0, 1], [1, 1], [None, None], [1, None], [0, 1]))
    ]
    replayed = []
    for batch in steps:
        hook.observe(batch)
        replayed.append(hook.replay(make_batch(batch, 6, 0.0)) is not None)
    assert hook.rewards == [1, 1, 0.5]  # only judged responses count; the third step is not recorded
    assert replayed == [False, False, False, False, True]  # nor replayed


def test_a_judge_that_always_fails_stops_the_run(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def bad(response, row):\n    raise ValueError('no model')\n")
    batch = collected([0], [[1, 1]])
    with pytest.raises(RunStopped, match=r"step 100: the judge .*judge.py:bad failed on all 2 .*no model"):
        judging(judges.FlawJudge, hook_specs.Judge(f"{path}:bad"), batch)


def test_split_leaves_scalars_whole():
    rollouts = Batch(
        Groups(np.zeros((4, 3)), np.ones(4), np.zeros((4, 2, 5))),
        Scored(
            np.zeros((4, 2, 5)), np.arange(8.0).reshape(4, 2), np.ones((4, 2, 5)), progress=np.float32(0.5)
        ),
    )
    one, two = rollouts.split(2)
    assert one.scored.rewards.tolist() == [[0, 1], [2, 3]] and two.groups.prompts.shape == (2, 3)
    assert one.scored.progress == two.scored.progress == np.float32(0.5)
