"""Records of responses in whole runs: complete, and in agreement with the metrics of their step."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tiny import VERIFIER

from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.inspection.load import read_run
from lpo_jax.inspection.verdict import judge
from lpo_jax.reporting import read_metrics
from lpo_jax.reporting.metric_names import heldout_score
from lpo_jax.reporting.writers import sample_files
from lpo_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("no_plots", "one_layout")


def read(run, name):
    return [json.loads(line) for line in Path(run, name).read_text().splitlines()]


def step_row(run, step):
    return next(row for row in read_metrics(run) if row["step"] == step and "actor/grad_norm" in row)


@pytest.mark.parametrize("method", ["dapo", "mc-grpo", "ssl-tiers"])
def test_shaped_rewards_and_advantages_are_those_of_the_metrics(run_config, method):
    config = run_config(objective={"name": method}, training={"steps": 1}, evaluation={"every": 0})
    train(parse_config(config))
    records, row = read(config["output"], "rollouts/1.jsonl"), step_row(config["output"], 1)
    assert len(records) == 16 and all(record["phase"] == "train" for record in records)
    for metric, key in (("rewards", "shaped_reward"), ("advantages", "advantage")):
        values = np.array([record[key] for record in records if record["valid"]])
        for how in ("mean", "max", "min"):
            found = row[f"critic/{metric}/{how}"]
            np.testing.assert_allclose(found, getattr(values, how)(), rtol=1e-5, atol=1e-6)
    scores = np.array([record["score"] for record in records])
    np.testing.assert_allclose(row["critic/score/mean"], scores.mean(), rtol=1e-6)
    lengths = [record["parts"]["length"] for record in records]
    np.testing.assert_allclose(row["reward/parts/length"], np.mean(lengths), rtol=1e-12)
    shaped, tokens, passed = (
        np.array([record[key] for record in records]) for key in ("shaped_reward", "tokens", "outcome")
    )
    if method == "dapo":  # equation 13 with max_tokens 6 and a buffer of 1.2 tokens
        np.testing.assert_allclose(shaped, scores - ((tokens - 6) / 1.2 + 1).clip(0, 1), atol=1e-5)
    if method == "ssl-tiers":
        np.testing.assert_allclose(shaped, (passed == "pass") + 0.5 * np.floor(scores * 4) / 4, atol=1e-6)


SUM_OF_PARTS = """
def verify(response, row):
    digits, letter = sum(c.isdigit() for c in response) / 6, response[:1].isalpha()
    return Verdict(digits + 0.5 * letter, "pass" if digits > 0.3 and letter else "wrong",
                   {"digits": digits, "letter": letter})
"""


def test_a_sum_of_rewards_is_recorded_part_by_part(run_config, tmp_path):
    """A weighted sum of two rewards: parts, reward and normalised advantage agree between metrics and responses."""
    task = tmp_path / "two_parts.py"
    task.write_text(VERIFIER + SUM_OF_PARTS)
    config = run_config(
        task={"name": "python", "file": str(task)},
        objective={"name": "grpo"},
        training={"steps": 1},
        evaluation={"every": 0},
    )
    train(parse_config(config))
    records, row = read(config["output"], "rollouts/1.jsonl"), step_row(config["output"], 1)
    parts = {
        name: np.array([record["parts"][name] for record in records], float) for name in ("digits", "letter")
    }
    assert min(np.ptp(x) for x in parts.values()) > 0
    for name, values in parts.items():
        np.testing.assert_allclose(row[f"reward/parts/{name}"], values.mean(), rtol=1e-12)
    rewards = (parts["digits"] + 0.5 * parts["letter"]).reshape(-1, 4)
    shaped, advantages = (np.array([r[key] for r in records]) for key in ("shaped_reward", "advantage"))
    np.testing.assert_allclose(shaped, rewards.ravel(), atol=1e-6)
    np.testing.assert_allclose(row["critic/rewards/mean"], rewards.mean(), rtol=1e-6)
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(advantages, expected.ravel(), rtol=1e-4, atol=1e-5)
    for how in ("mean", "max", "min"):
        np.testing.assert_allclose(
            row[f"critic/advantages/{how}"], getattr(expected, how)(), rtol=1e-4, atol=1e-5
        )


def test_records_of_tokens_are_complete(run_config):
    config = run_config(training={"steps": 1}, evaluation={"every": 0}, optimizer={"learning_rate": 0.1})
    train(parse_config(config))
    records, row = read(config["output"], "rollouts/1.jsonl"), step_row(config["output"], 1)
    assert [record["update"] for record in records] == [0] * 8 + [1] * 8
    for record in records:
        lists = {key: value for key, value in record.items() if key.startswith("token_")}
        assert len(lists) == 6 and {len(value) for value in lists.values()} == {record["tokens"]}
        assert "".join(record["token_text"]).removesuffix("<end>") == record["output"]
        np.testing.assert_allclose(record["logp"], np.mean(record["token_logp"]), atol=4e-4)
        np.testing.assert_allclose(record["entropy"], np.mean(record["token_entropy"]), atol=4e-4)
        assert record["behaviour_step"] == 0 and record["gts"].strip("7") == ""
    first, second = records[:8], records[8:]
    assert {ratio for record in first for ratio in record["token_ratio"]} == {1.0}
    assert all(gate for record in first for gate in record["token_gate"])
    # The second update has moved away from the behaviour policy; LPO's clip shuts tokens beyond a ratio of 0.8 to 1.2.
    for record in second:
        current, behaviour = (np.array(record[key], float) for key in ("token_trainer_logp", "token_logp"))
        ran = ~np.isnan(current)  # up to the last token that the gate lets through
        ratio = np.array(record["token_ratio"])[ran]
        np.testing.assert_allclose(ratio, np.exp(current - behaviour)[ran], rtol=1e-3, atol=3e-4)
        outside = abs(np.array(record["token_ratio"]) - 1) > 0.2 + 1e-3
        shut = ~np.array(record["token_gate"], bool)
        if record["coefficient"]:
            assert (shut[outside]).all()
        else:
            assert not shut.any()
    assert row["actor/pg_clipfrac"] > 0
    entropies = [entropy for record in first + second for entropy in record["token_entropy"]]
    assert row["actor/entropy"] == pytest.approx(np.mean(entropies), rel=1e-3)


def test_evaluations_before_and_after_a_warm_start_are_both_kept(run_config):
    config = run_config(
        warm_start={"steps": 2, "batch_size": 8, "learning_rate": 1e-2},
        training={"steps": 1},
        evaluation={"every": 0},
    )
    train(parse_config(config))
    files = sample_files(config["output"], "validation")
    assert [file.path.name for file in files] == ["0.jsonl", "0.warm-started.jsonl", "1.jsonl"]
    held = [read(config["output"], f"validation/{file.path.name}") for file in files]
    assert [rows[0]["phase"] for rows in held] == ["cold", "warm-started", "step"]
    assert held[0][0]["prompt_id"] == held[2][0]["prompt_id"] != held[0][4]["prompt_id"]
    assert [row["output"] for row in held[0]] != [row["output"] for row in held[1]]


def test_the_best_checkpoint_follows_the_named_score(run_config, capsys):
    for score, value in (("reward", lambda r: r["score"]), ("length", lambda r: r["parts"]["length"])):
        config = run_config(score, evaluation={"every": 1, "score": score}, training={"steps": 2})
        train(parse_config(config))
        run = config["output"]
        rows = [row for row in read_metrics(run) if heldout_score(row)]
        for row in rows:
            mean = np.mean([value(record) for record in read(run, f"validation/{row['step']}.jsonl")])
            np.testing.assert_allclose(heldout_score(row)[0], mean, rtol=1e-6)
            assert heldout_score(row)[1] <= mean <= heldout_score(row)[2]
        best = max(rows[1:], key=lambda row: heldout_score(row)[0])["step"]
        printed = capsys.readouterr().out
        assert f"best step {best}" in printed and score in printed


@pytest.mark.parametrize(("score", "name", "unit"), [("auto", "pass@1", 100), ("length", "length", 1)])
def test_the_report_judges_the_score_of_the_run(run_config, score, name, unit):
    """Its interval is that of the difference between both evaluations, also where the task names the score."""
    config = run_config(evaluation={"every": 2, "score": score}, training={"steps": 2})
    train(parse_config(config))
    sentence = judge(read_run(Path(config["output"]))).sentence
    (first, *_), *_, (last, *_) = filter(None, map(heldout_score, read_metrics(config["output"])))
    assert f" {name} " in sentence
    low, high = map(float, re.search(r"interval (\S+) to (\S+) over", sentence).groups())
    assert low - 0.06 <= unit * (last - first) <= high + 0.06 and low < high


def test_an_unknown_score_is_refused(run_config):
    config = run_config(evaluation={"every": 1, "score": "lenght"})
    with pytest.raises(UserError, match=r"evaluation.score = 'lenght'.*did you mean 'length'"):
        train(parse_config(config))
