"""One pass over the rollout files of a run: figures of every step, an audit of the verifier, and the groups to show.

The figures cover all responses. The texts of a large run do not fit into a file that opens quickly, so the groups of
some prompts are kept: the same prompts at every step, chosen by a hash of their id, such that the compressed texts stay
within a budget of bytes.
"""

import base64
import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lpo_jax.inspection.images import image_references
from lpo_jax.inspection.load import Row, Run, finite_number, groups_of, read_samples
from lpo_jax.reporting.text import sanitise
from lpo_jax.types import Json

# Keys of a rollout row and the shorter ones of the report, which hold hundreds of thousands of them.
KEYS = {
    "k": "k",
    "score": "r",
    "shaped_reward": "s",
    "advantage": "a",
    "outcome": "o",
    "target": "w",
    "policy": "p",
    "coefficient": "c",
    "tokens": "n",
    "finished": "f",
    "valid": "v",
    "logp": "l",
    "entropy": "e",
    "parts": "x",
    "behaviour_step": "b",
    "update": "u",
    "token_text": "tt",
    "token_logp": "tl",
    "token_entropy": "te",
    "token_ratio": "tr",
    "token_gate": "tg",
}
_AUDITED = 12  # rows of each table of the audit
_BINS = 20
_MAX_TEXT = 20_000  # characters of one text in the report


@dataclass
class StepFigures:
    """Counts of one training step, over all of its responses.

    Attributes:
        step: the training step.
        responses: number of responses.
        fail: groups in which no response passed.
        mixed: groups in which some passed.
        solved: groups in which all passed.
        equal: groups whose valid rewards are all equal, so that they give no signal.
        cut: responses without an end token.
        rewards: all rewards of valid responses.
        kept: groups whose texts are in the report.
        chunk: these groups, compressed; see `pack`.
    """

    step: int
    responses: int = 0
    fail: int = 0
    mixed: int = 0
    solved: int = 0
    equal: int = 0
    cut: int = 0
    rewards: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    kept: int = 0
    chunk: str = ""

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.fail + self.mixed + self.solved


@dataclass
class Digest:
    """What the report shows of the rollouts of one run.

    Attributes:
        steps: figures of each step.
        images: names of the images of kept groups, in the order of the steps.
        prompts: for each kept prompt id, (step, passed, responses) of each of its groups.
        failures: number of responses that could not be judged, by reason.
        unequal: pairs of equal answers to one prompt with different scores.
        short: responses with the highest rewards, the shortest first.
        worst_tokens: tokens with the largest gap between sampler and trainer, if the run recorded them.
        share: the share of prompts whose texts are kept.
        notes: sentences about damaged files and what was sampled.
    """

    steps: list[StepFigures] = field(default_factory=list)
    images: dict[str, None] = field(default_factory=dict)
    prompts: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    unequal: list[dict[str, Json]] = field(default_factory=list)
    short: list[dict[str, Json]] = field(default_factory=list)
    worst_tokens: list[dict[str, Json]] = field(default_factory=list)
    share: float = 1.0
    notes: list[str] = field(default_factory=list)


def digest(run: Run, budget: int) -> Digest:
    """Read all rollout files of a run.

    Args:
        run: the run.
        budget: bytes that the compressed texts may take in the report.
    """
    found = Digest(share=_share(list(run.rollouts.values()), budget))
    answers: dict[int, tuple[float, int, int]] = {}
    for step, path in run.rollouts.items():
        rows, notes = read_samples(path)
        found.notes += notes
        found.steps.append(_digest_step(step, rows, found, answers))
    found.short = sorted(found.short, key=lambda row: (-row["r"], row["n"]))[:_AUDITED]
    kept, groups = sum(of.kept for of in found.steps), sum(of.groups for of in found.steps)
    if kept < groups:
        found.notes.append(
            f"{run.name}: the texts of {kept:,} of {groups:,} groups are in this file: the same prompts at every step, "
            "chosen by a hash of their id. All curves, counts, histograms and the audit cover all responses."
        )
    return found


def pack(groups: Sequence[Sequence[Row]]) -> str:
    """Compress groups: JSON with short keys, gzip, base64."""
    text = json.dumps(
        [_group(group) for group in groups], separators=(",", ":"), allow_nan=False, default=str
    )
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def histogram(digest: Digest) -> dict[str, Json]:
    """Return shares of rewards in bins, of the first and of the last quarter of the steps."""
    steps = [of for of in digest.steps if of.rewards.size]
    if not steps:
        return {}
    quarter = max(1, len(steps) // 4)
    parts = {"first": steps[:quarter], "last": steps[-quarter:]}
    low, high = min(float(of.rewards.min()) for of in steps), max(float(of.rewards.max()) for of in steps)
    edges = np.linspace(low - 0.5, high + 0.5, 2) if low == high else np.linspace(low, high, _BINS + 1)
    shares = {}
    for name, some in parts.items():
        rewards = np.concatenate([of.rewards for of in some])
        shares[name] = (np.histogram(rewards, edges)[0] / max(rewards.size, 1)).tolist()
    return {
        "centres": ((edges[1:] + edges[:-1]) / 2).tolist(),
        "shares": shares,
        "steps": {name: [some[0].step, some[-1].step] for name, some in parts.items()},
    }


def _digest_step(step: int, rows: Sequence[Row], found: Digest, answers: dict) -> StepFigures:
    of = StepFigures(step, responses=len(rows))
    kept = []
    groups = list(groups_of(rows))
    chosen = {i for i, group in enumerate(groups) if _kept(group[0].get("id"), found.share)}
    if groups and not chosen:
        chosen = {min(range(len(groups)), key=lambda i: _hash(groups[i][0].get("id")))}
    for i, group in enumerate(groups):
        valid = [row for row in group if _valid(row)]
        passed = sum(row.get("outcome") == "pass" for row in group)
        of.fail, of.mixed, of.solved = (
            of.fail + (passed == 0),
            of.mixed + (0 < passed < len(group)),
            of.solved + (passed == len(group)),
        )
        of.equal += len({row.get("score") for row in valid}) <= 1
        _audit(step, group, found, answers)
        if i in chosen:
            kept.append(group)
            found.images |= {name: None for name, _ in image_references(group[0])}
            prompt = sanitise(str(group[0].get("id")))
            found.prompts.setdefault(prompt, []).append((step, passed, len(group)))
    of.cut = sum(row.get("finished") is False for row in rows)
    of.rewards = np.array(
        [x for row in rows if _valid(row) and (x := finite_number(row.get("score"))) is not None], np.float32
    )
    of.kept, of.chunk = len(kept), pack(kept)
    return of


def _audit(step: int, group: Sequence[Row], found: Digest, answers: dict) -> None:
    """Note failures, equal answers with different scores, and short responses with high rewards."""
    for row in group:
        parts = row.get("parts") if isinstance(row.get("parts"), dict) else {}
        if row.get("outcome") in ("infrastructure", "timeout"):
            reason = f"{row['outcome']}: {sanitise(str(parts.get('reason', 'no reason recorded')))[:200]}"
            found.failures[reason] = found.failures.get(reason, 0) + 1
        reward = finite_number(row.get("score"))
        if reward is None or not _valid(row):
            continue
        answer = parts.get("answer", row["output"])
        key, k = hash((str(row.get("id")), str(answer), row["input"])), row.get("k", 0)
        before = answers.setdefault(key, (reward, step, k))
        if before[0] != reward and len(found.unequal) < _AUDITED:
            first = {"r": before[0], "step": before[1], "k": before[2]}
            found.unequal.append(_place(step, row) | {"answer": _text(answer)[:200], "first": first})
        short = found.short
        rank = (-reward, row.get("tokens", len(row["output"])))
        if len(short) < _AUDITED or rank < (-short[-1]["r"], short[-1]["n"]):
            short.append(_place(step, row) | {"text": _text(row["output"])[:300]})
            short.sort(key=lambda item: (-item["r"], item["n"]))
            del short[_AUDITED:]
        _note_gaps(step, row, found)


def _note_gaps(step: int, row: Row, found: Digest) -> None:
    """Note the tokens whose log-probs in the sampler and in the trainer differ most."""
    texts, sampler, trainer = (
        row.get(key) or [] for key in ("token_text", "token_logp", "token_trainer_logp")
    )
    for position, (text, before, after) in enumerate(zip(texts, sampler, trainer)):
        if finite_number(before) is not None and finite_number(after) is not None:
            item = {"token": _text(text), "gap": abs(after - before), "position": position}
            if len(found.worst_tokens) < _AUDITED or item["gap"] > found.worst_tokens[-1]["gap"]:
                found.worst_tokens.append(_place(step, row) | item)
                found.worst_tokens.sort(key=lambda item: -item["gap"])
                del found.worst_tokens[_AUDITED:]


def _place(step: int, row: Row) -> dict[str, Json]:
    reward, tokens = finite_number(row.get("score")), row.get("tokens", len(row["output"]))
    return {"step": step, "id": sanitise(str(row.get("id"))), "k": row.get("k", 0), "r": reward, "n": tokens}


def _group(group: Sequence[Row]) -> dict[str, Json]:
    first = group[0]
    packed = {
        "id": sanitise(str(first.get("id"))),
        "q": _text(str(first.get("input", ""))),
        "g": [_response(row) for row in group],
    }
    if first.get("gts") is not None:
        packed["y"] = _text(first["gts"])
    if images := image_references(first):
        packed["i"] = images
    return packed


def _response(row: Row) -> dict[str, Json]:
    packed: dict[str, Json] = {"t": _text(row["output"])}
    for key, short in KEYS.items():
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, str):
            value = sanitise(value)
        elif isinstance(value, float):
            value = float(f"{value:.4g}")
        elif isinstance(value, Mapping):
            value = {
                _text(name)[:80]: _text(of)[:400] if isinstance(of, str) else of for name, of in value.items()
            }
        elif isinstance(value, list):
            value = [
                _text(of)
                if isinstance(of, str)
                else float(f"{of:.3g}")
                if finite_number(of) is not None
                else None
                for of in value
            ]
        packed[short] = value
    return packed


def _text(value: Json) -> str:
    """Return a value as visible text: control characters and lone surrogates become escapes."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) > _MAX_TEXT:
        text = f"{text[: _MAX_TEXT // 2]}\n… {len(text) - _MAX_TEXT:,} characters left out …\n{text[-_MAX_TEXT // 2 :]}"
    return sanitise(text)


def _valid(row: Row) -> bool:
    return bool(row.get("valid", row.get("outcome") != "infrastructure"))


def _share(files: Sequence[Path], budget: int) -> float:
    """The share of prompts that fit into the budget, by the compression of a few steps."""
    sizes = [path.stat().st_size for path in files if path.is_file()]
    if not sum(sizes) or sum(sizes) < budget:  # text never grows by more than it shrinks
        return 1.0
    tried = [files[i] for i in sorted({0, len(files) // 2, len(files) - 1}) if files[i].is_file()]
    packed = sum(len(pack(list(groups_of(read_samples(path)[0])))) for path in tried)
    ratio = packed / max(1, sum(path.stat().st_size for path in tried))
    return min(1.0, budget / (1.1 * ratio * sum(sizes)))


def _hash(prompt: Json) -> int:
    return zlib.crc32(str(prompt).encode("utf-8", "backslashreplace"))


def _kept(prompt: Json, share: float) -> bool:
    return _hash(prompt) < share * 2**32
