"""Every pair of hooks in the real loop: both have their effect within four steps, or the pair is refused at the start.

The test records what was sampled, the resulting rollouts, and the inputs of the objective. From the samples it computes
the expected effect of each hook.
"""

import itertools
import types

import numpy as np
import pytest
import yaml

from lpo_jax.commands import main as cli
from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.objectives import vocabulary
from lpo_jax.reporting import read_metrics
from lpo_jax.rollout.hooks.base import Tools
from lpo_jax.tasks import PromptIterator
from lpo_jax.training import learner, loop
from lpo_jax.training.check import check_config
from lpo_jax.training.loop import train

# The pass rate gives both mixed groups and groups in which every response fails.
TASK = """
from lpo_jax.rewards import Verdict

def dataset(split):
    first, count = {"train": (0, 48), "heldout": (100, 4)}[split]
    return [{"n": n, "hints": ["7"]} for n in range(first, first + count)]

def prompt(row):
    return "say " + "x" * (row["n"] % 7) + str(row["n"])

def solution(row):
    return "7" * 4

def verify(response, row):
    passed = sum(c.isdigit() for c in response[2:5]) >= 2
    return Verdict(float(passed), "pass" if passed else "wrong", {"answer": response[:1]})

def judge(response, row):
    wrong = response[2:3].isdigit()
    return Verdict(float(wrong), "wrong", {"wrong": "0:2" if wrong else ""})
"""

# The options that a method with the hook needs in addition.
BESIDE = {
    "budgets": {"credit": "anytime-returns", "budgets": 2, "summaries": 2, "summary_tokens": 4},
    "dynamic-sampling": {"max_rounds": 8},
    "gaussian-sampling": {},
    "greedy-baseline": {"centre": "baseline"},
    "judge": {"shape": ["flaw-penalty"], "flaw_penalty": 0.5},
    "ladder-hints": {"hint_after": 0},
    "learnability-sampling": {},
    "prefix-values": {"credit": "progress", "segments": 2},
    "previous-policy": {"regular": ["previous-kl"]},
    "replay": {"prompt_weight": "hook-weight"},
    "sibling-teacher": {"regular": ["distil"], "token_weight": "untaught"},
    "solution-hints": {"hint_fractions": [0.5]},
    "step-judge": {"credit": "step-penalty"},
}
REFUSED = {
    ("gaussian-sampling", "learnability-sampling"): "both choose the prompts that are sampled",
    ("ladder-hints", "solution-hints"): "both replace the groups in which every response fails",
    ("previous-policy", "sibling-teacher"): "both give teacher",
    ("budgets", "prefix-values"): "both give credit",
    ("budgets", "step-judge"): "both give credit",
    ("prefix-values", "step-judge"): "both give credit",
}
PAIRS = [pair for pair in itertools.combinations(sorted(BESIDE), 2) if pair not in REFUSED]


def options(*names, judge=""):
    """The `objective` section of a method with the given hooks and the options that they need."""
    values = {"name": "grpo", "hooks": list(names)}
    for name in names:
        values |= BESIDE[name]
    if {"judge", "step-judge"} & set(names):
        values["judge"] = judge
    return values


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "digits.py"
    path.write_text(TASK)
    return path


@pytest.fixture
def config_of(run_config, task_file):
    """Make the config of a run with the given hooks: four steps of four prompts, two updates per step."""

    def make(*names):
        return run_config(
            objective=options(*names, judge=f"{task_file}:judge"),
            task={"name": "python", "file": str(task_file)},
            training={"steps": 4, "save_rollouts": False},
            optimizer={"learning_rate": 1e-2},  # soon no group would have both rewards with more
            evaluation={"problems": 4, "every": 0},
            checkpoint={"every": 0, "keep": 1},
        )

    return make


@pytest.fixture
def watched(monkeypatch, one_layout):
    """A list that gets a record of every step: calls of the sampler, the round, its rollouts, and update inputs.

    Rows are not packed by their actual lengths, so that all runs share a few compiled programs.
    """
    steps = []

    def spy(owner, name, note):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            note(result, *args, **kwargs)
            return result

        monkeypatch.setattr(owner, name, call)

    def begun(environment, hooks, runner, params, data, step, in_flight):
        steps.append(types.SimpleNamespace(environment=environment, hooks=hooks, calls=[], updates=[]))

    real = loop.sample_round
    monkeypatch.setattr(loop, "sample_round", lambda *args: begun(*args) or real(*args))
    spy(Tools, "sample", lambda batch, tools, rows, **options: steps[-1].calls.append((batch, options)))
    spy(loop, "make_batch", lambda _, rollouts, *args: setattr(steps[-1], "rollouts", rollouts))

    def completed(result, learns, *args, **kwargs):
        steps[-1].scored, steps[-1].reported = result[0].scored, learns.metrics()

    spy(loop, "complete_batch", completed)
    spy(
        learner,
        "signal",
        lambda learned, objective, used, scored: steps[-1].updates.append((scored, learned)),
    )
    return steps


def plain(step):
    """The batches that the step sampled from unchanged prompts."""
    return [batch for batch, options in step.calls if options.keys() == {"at_least"}]


def sampled_ids(step):
    return [row for batch in plain(step) for row in batch.ids]


def hook_of(step, name):
    return next(hook for hook in step.hooks if vocabulary.word(hook.spec) == name)


def check_curriculum(steps, name, momentum, share):
    """Pass rates include all samples; prompts are drawn by them, each at most once per step."""
    environment, rates = steps[0].environment, {}
    data = PromptIterator(environment.train_rows, prompts=4, seed=environment.config.seed)
    drawn_otherwise = 0
    for step in steps:
        ids = sampled_ids(step)
        assert len(ids) == len(set(ids)) and all(len(batch.ids) == 4 for batch in plain(step))
        for batch in plain(step):
            offered = [row for row, _ in next(data)]
            kept = [row for row in offered[: round(4 * share)] if row in batch.ids]
            assert batch.ids[: len(kept)] == kept
            drawn_otherwise += batch.ids[len(kept) :] != offered[len(kept) :]
            if name == "learnability-sampling":  # always or never solved prompts carry no signal
                assert all(rates.get(row, 0.5) not in (0, 1) for row in batch.ids[len(kept) :])
        for batch in plain(step):
            for row, passed in zip(batch.ids, batch.passed):
                rates[row] = momentum * rates.get(row, 0.5) + (1 - momentum) * passed.mean()
    assert hook_of(steps[-1], name).rates == pytest.approx(rates)
    return drawn_otherwise


def check_hints(steps, name):
    """Every group whose responses all failed is sampled again with a hint, and is replaced if that passes."""
    replaced = 0
    for step in steps:
        for (batch, options), (again, hinted) in itertools.pairwise(step.calls):
            if "prompts" not in options and not batch.passed.any(-1).all():
                assert len(hinted["prompts"]) == len(again.ids) and again.ids == [
                    row for row, passed in zip(batch.ids, batch.passed) if not passed.any()
                ]
        helped = {
            row
            for batch, options in step.calls
            if "prompts" in options and "greedy" not in options and "written" not in options
            for row, passed in zip(batch.ids, batch.passed)
            if passed.any()
        }
        assert step.reported["lpo/hinted_groups"] == len(helped)
        kept = step.rollouts
        for row, text, passed in zip(kept.ids, kept.prompt_texts, kept.passed):
            if row in helped:
                replaced += 1
                assert passed.any()
                assert ("begins" in text) is (name == "solution-hints")
                assert name == "solution-hints" or (passed.sum() == 1 and step.rollouts.rescore)
            else:
                assert "begins" not in text
    return replaced


def check_dynamic(steps):
    """The batch consists of groups with different rewards; some step needs more than one round."""
    mixed = lambda rewards: np.ptp(rewards, axis=-1) > 0  # noqa: E731
    for step in steps:
        kept = step.rollouts
        ids = sampled_ids(step)
        assert len(kept.ids) == 4 and set(kept.ids) <= set(ids) and len(ids) == len(set(ids))
        assert step.reported["lpo/sampling_rounds"] == len(plain(step))
        assert step.reported["lpo/useful_group_frac"] == 1 == mixed(kept.rewards).mean()
        for _, learned in step.updates[:2]:
            assert np.abs(learned.cotangent.logp).max() > 0
    return max(len(plain(step)) for step in steps) > 1


def check_greedy(steps):
    for step in steps:
        (greedy,) = [batch for batch, options in step.calls if options.get("greedy")]
        assert greedy.prompt_texts == step.rollouts.prompt_texts
        np.testing.assert_array_equal(step.scored.baseline, greedy.rewards)
    return True


def judged(batch):
    return np.array([[text[2:3].isdigit() for text in texts] for texts in batch.texts])


def check_judge(steps):
    for step in steps:
        batch = step.rollouts
        np.testing.assert_array_equal(step.scored.flawed, batch.passed & judged(batch))
    return any(np.any(step.scored.flawed) for step in steps)


def check_step_judge(steps):
    for step in steps:
        wrong = np.asarray(step.scored.credit) == 1
        assert (wrong[..., :2].any(-1) == judged(step.rollouts)).all() and not wrong[..., 3:].any()
    return any(np.any(step.scored.credit) for step in steps)


def check_prefix_values(steps):
    for step in steps:
        credit = np.where(step.scored.mask, step.scored.credit, 0)
        assert np.isfinite(credit).all() and np.abs(credit).max() > 0
        assert (
            max(len(np.unique(row)) for row in credit.reshape(-1, credit.shape[-1])) <= 3
        )  # 2 segments and 0
    return True


def check_budgets(steps):
    cut = 0
    for step in steps:
        batch, credit = step.rollouts, np.asarray(step.scored.credit)
        np.testing.assert_array_equal(credit[..., 3:6], np.broadcast_to(batch.rewards[..., None], (4, 4, 3)))
        answers = [sampled for sampled, options in step.calls if "written" in options]
        assert sum(len(sampled.ids) for sampled in answers) == (batch.responses.lengths > 3).sum()
        cut += (credit[..., 0] != batch.rewards).sum()
    return cut


def check_previous(steps):
    for step in steps:
        assert np.asarray(step.scored.teacher.valid).all()
        first, second = (learned.metrics["lpo/previous_kl"] for _, learned in step.updates[:2])
        assert abs(first) < 1e-5 < second  # the policy has moved away from the behaviour policy
    return True


def check_sibling(steps):
    taught = 0
    for step in steps:
        passed = step.rollouts.passed
        valid = ~passed & passed.any(-1, keepdims=True)
        np.testing.assert_array_equal(step.scored.teacher.valid, valid)
        for scored, learned in step.updates[:2]:
            some = bool(np.any(scored.teacher.valid))
            assert (learned.metrics["lpo/distil_jsd"] > 0) == some
            taught += some
    return taught


def check_replay(steps):
    """The previous batch is replayed, with a weight that compares the rewards with those of earlier steps."""
    means, replayed = [], 0
    for before, step in zip([None, *steps], steps):
        everything = np.concatenate([batch.rewards.ravel() for batch in plain(step)])
        weight = step.reported["lpo/replay_weight"]
        if len(means) > 1 and np.std(means) > 0:
            assert np.sign(weight) == np.sign(round(everything.mean() - np.mean(means), 9))
        means.append(everything.mean())
        assert len(step.updates) == 2 + (weight != 0)
        assert all(scored.weight is None for scored, _ in step.updates[:2])
        for scored, learned in step.updates[2:]:
            replayed += 1
            np.testing.assert_array_equal(scored.rewards, before.scored.rewards)
            np.testing.assert_allclose(scored.weight, weight, rtol=1e-6)
            mixed = np.ptp(scored.rewards, axis=-1).any()
            assert not mixed or np.abs(learned.cotangent.logp).max() > 0
    return replayed


# Each check raises if the effect differs from the expected one, and returns whether the effect occurred.
CHECKS = {
    "budgets": check_budgets,
    "dynamic-sampling": check_dynamic,
    "gaussian-sampling": lambda steps: check_curriculum(steps, "gaussian-sampling", 0.9, 0),
    "greedy-baseline": check_greedy,
    "judge": check_judge,
    "ladder-hints": lambda steps: check_hints(steps, "ladder-hints"),
    "learnability-sampling": lambda steps: check_curriculum(steps, "learnability-sampling", 0, 0.5),
    "prefix-values": check_prefix_values,
    "previous-policy": check_previous,
    "replay": check_replay,
    "sibling-teacher": check_sibling,
    "solution-hints": lambda steps: check_hints(steps, "solution-hints"),
    "step-judge": check_step_judge,
}


def test_every_hook_is_paired():
    assert set(BESIDE) == set(CHECKS) == set(vocabulary.words("hooks"))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_two_hooks_both_have_their_effect(config_of, watched, no_plots, one_layout, pair):
    for seed in range(3):
        watched.clear()
        config = config_of(*pair) | {"seed": seed}
        config["output"] += str(seed)
        train(parse_config(config))
        rows = [row for row in read_metrics(config["output"]) if "actor/grad_norm" in row]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert all(row["lpo/skipped_updates"] == 0 and np.isfinite(row["actor/grad_norm"]) for row in rows)
        if all([CHECKS[name](watched) for name in pair]):
            return
    pytest.fail("in none of the runs had both hooks something to do")


@pytest.mark.parametrize(
    ("pair", "reason"), REFUSED.items(), ids=lambda x: "+".join(x) if isinstance(x, tuple) else ""
)
def test_two_hooks_of_one_kind_are_refused_in_either_order(config_of, pair, reason):
    for names in (pair, pair[::-1]):
        message = f"hooks: {names[0]} and {names[1]} cannot be combined: {reason}"
        with pytest.raises(UserError, match=message):
            check_config(parse_config(config_of(*names)))


@pytest.mark.parametrize("name", sorted(BESIDE))
def test_a_hook_named_twice_is_refused(config_of, name):
    with pytest.raises(UserError, match=f"{name} and {name} cannot be combined: it is named twice"):
        check_config(parse_config(config_of(name, name)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hooks": ["replay"]}, "nothing in the method uses the weight that replay gives; set objective.prompt_w"),
        ({"hooks": ["greedy-baseline"]}, "uses the baseline that greedy-baseline gives; set objective.centre=baseline"),
        ({"hooks": ["judge"]}, "uses the flawed that judge gives; set objective.shape=flaw-penalty"),
        ({"hooks": ["step-judge"]}, "uses the credit that step-judge gives; set objective.credit=step-penalty"),
        ({"hooks": ["prefix-values"]}, "uses the credit that prefix-values gives; set objective.credit=progress"),
        ({"hooks": ["budgets"]}, "uses the credit that budgets gives; set objective.credit=anytime-returns"),
        ({"hooks": ["previous-policy"]}, "uses the teacher that previous-policy gives; set objective.regular=prev"),
        ({"hooks": ["sibling-teacher"]}, "uses the teacher that sibling-teacher gives; set objective.regular=distil"),
        # A part that uses the same field with another meaning.
        ({"hooks": ["sibling-teacher"], "token_weight": "untaught"}, "uses the teacher that sibling-teacher gives"),
        ({"hooks": ["step-judge"], "credit": "progress"}, "progress cannot use the credit that step-judge gives"),
        ({"hooks": ["previous-policy"], "regular": "distil"}, "distil cannot use the teacher that previous-p"),
        ({"hooks": ["budgets"], "credit": "step-penalty"}, "step-penalty cannot use the credit that budgets gives"),
        # A part without its hook.
        ({"prompt_weight": "hook-weight"}, "hook-weight does nothing: no hook of the method gives weight"),
    ],
)  # fmt: skip
def test_a_hook_whose_effect_would_be_void_or_wrong_is_refused(config_of, changed, message):
    config = config_of()
    config["objective"] = {"name": "grpo", **changed}
    with pytest.raises(UserError, match=message):
        check_config(parse_config(config))


def test_the_refusal_is_one_line_and_status_2(config_of, tmp_path, capsys):
    config = config_of("solution-hints", "ladder-hints")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "solution-hints and ladder-hints cannot be combined" in lines[0]
