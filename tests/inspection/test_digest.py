"""Figures of steps, the audit of the verifier, and which groups a large run keeps."""

import base64
import gzip
import json

import pytest
from synthetic_run import write_run

from lpo_jax.inspection.digest import digest, histogram
from lpo_jax.inspection.load import read_run, read_samples
from lpo_jax.inspection.page import BUDGET


def unpack(chunk):
    return json.loads(gzip.decompress(base64.b64decode(chunk)))


def test_figures_equal_those_of_the_rollout_files(synthetic_run):
    run = read_run(synthetic_run)
    found = digest(run, BUDGET)
    assert found.share == 1 and not found.notes
    for of in found.steps:
        rows = read_samples(run.rollouts[of.step])[0]
        groups = [rows[i : i + 4] for i in range(0, 16, 4)]
        passed = [sum(row["outcome"] == "pass" for row in group) for group in groups]
        assert (of.fail, of.solved) == (passed.count(0), passed.count(4)) and of.groups == 4
        assert of.equal == sum(len({row["score"] for row in group}) == 1 for group in groups)
        assert of.cut == sum(not row["finished"] for row in rows)
        packed = unpack(of.chunk)
        assert [r["t"] for group in packed for r in group["g"]] == [row["output"] for row in rows]
        assert [r["c"] for group in packed for r in group["g"]] == pytest.approx(
            [row["coefficient"] for row in rows], rel=2e-3
        )
    assert found.worst_tokens[0]["gap"] >= found.worst_tokens[-1]["gap"] > 0


def test_a_large_run_keeps_the_same_prompts_at_every_step(tmp_path):
    run = read_run(write_run(tmp_path / "large", steps=5, prompts=40))
    found = digest(run, 40_000)
    assert 0 < found.share < 1
    assert sum(len(of.chunk) for of in found.steps) < 1.5 * 40_000
    assert all(of.kept >= 1 and of.groups == 40 and of.rewards.size == 160 for of in found.steps)
    assert "groups are in this file: the same prompts at every step" in found.notes[0]
    for prompt, groups in found.prompts.items():
        drawn = [
            step
            for step, path in run.rollouts.items()
            if any(str(row["id"]) == prompt for row in read_samples(path)[0])
        ]
        assert [step for step, _, _ in groups] == drawn


def test_the_audit(tmp_path):
    columns = ("id", "k", "output", "score", "outcome", "parts", "tokens")
    values = [
        (1, 0, "a long way to 7", 0.0, "wrong", {"answer": "7"}, 5),
        (1, 1, "7", 1.0, "pass", {"answer": "7"}, 1),
        (1, 2, "8", 0.0, "infrastructure", {"reason": "boom"}, 1),
        (2, 0, "7", 0.5, "wrong", {"answer": "7"}, 1),
    ]
    rows = [dict(zip(columns, row)) | {"input": f"prompt {row[0]}"} for row in values]
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = digest(read_run(tmp_path), BUDGET)
    assert found.failures == {"infrastructure: boom": 1}
    (pair,) = found.unequal
    assert (pair["answer"], pair["r"], pair["first"]) == ("7", 1.0, {"r": 0.0, "step": 1, "k": 0})
    assert [(item["r"], item["n"]) for item in found.short] == [(1.0, 1), (0.5, 1), (0.0, 5)]
    assert histogram(found)["shares"]["last"][0] == pytest.approx(1 / 3)
