"""Words that this project does not use, because the field has its own: each is found with what to write instead."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEARCHED = [
    "lpo_jax/**/*.py",
    "tests/**/*.py",
    "scripts/*.py",
    "benchmarks/*.py",
    "docs/**/*.md",
    "*.md",
    "configs/*.yaml",
]

# (regular expression, what to write instead, regular expression of the paths that are searched)
EVERYWHERE = ""
GLOSSARY = [
    (
        r"(?i)(?<!cloud )(?<!sqlite_)(?<![a-z])storage(?![a-z])",
        "KV cache; for weights: dtype",
        r"^(?!tests/launch)",  # where gcloud's storage is meant
    ),
    (r"(?<!in )\b[Pp]laces?\b(?! of\b)", "slot; for tokens: position", r"^lpo_jax/sampling|^tests/sampling"),
    (r"\b[Ww]aits? for (a|its|their) places?|\bgives? (its|their) places?", "queue; free a slot", EVERYWHERE),
    (
        r"\b(rows?|responses?|sequences?) that (waits?|goes on|go on|has ended|have ended)\b",
        "queued, active or finished rows",
        EVERYWHERE,
    ),
    (
        r"\b(policy|policies|model|weights) that (has |have )?(drew|sampled)\b",
        "behaviour policy",
        EVERYWHERE,
    ),
    (
        r"(?i)(?<![a-z])pieces?(?![a-z])",
        "split or chunk",
        r"^lpo_jax/(objectives|parallel|sampling|rollout|training|planner|models/(packing|attend|head))|^docs",
    ),
    (r"\bRoom\b|\b[Rr]oom (for|to|left|below)\b|\broom\b *[.=(,)\[]", "capacity, space", r"^lpo_jax"),
    (r"(?i)(?<![a-z])exam(s|ined|inees?)?(?![a-z])", "benchmark", EVERYWHERE),
    (
        r"\b(is|are|was|were) asked\b(?! (for|to)\b)|\basked (of|by)\b",
        "problem, prompt, benchmark",
        EVERYWHERE,
    ),
    (r"(?i)likeliest", "top-k, most probable", EVERYWHERE),
    (r"\blayers? looks? back\b|\bforward pass(es)? again\b", "recompute, rematerialise", EVERYWHERE),
    (r"\b([Tt]ells|[Hh]ears?|[Tt]old)\b(?!.* (apart|from)\b)", "report, return, receive, take", EVERYWHERE),
    (r"\b[Kk]nows? of\b|\b[Kk]nown of\b", "has, contains", EVERYWHERE),
    (
        r"\b(says|said) (it|which|what|how|whether|where|when|who|nothing)\b|\bhas to say\b|\b[Ii]t says\b",
        "return, report, describe",
        EVERYWHERE,
    ),
    (
        r"[,;] for (it|its|they|there|this|that|these|those|he)\b|\bFor (it|they|there)\b",
        "because",
        EVERYWHERE,
    ),
]


def hits(name: str, text: str) -> list[str]:
    """`path:line: word: replacement` of every word of the glossary in a file's text."""
    found = []
    for pattern, replacement, where in GLOSSARY:
        if re.search(where, name):
            for number, line in enumerate(text.splitlines(), 1):
                if match := re.search(pattern, line):
                    found.append(f"{name}:{number}: {match[0]!r}: write {replacement}: {line.strip()[:90]}")
    return found


def test_the_words_of_the_field_are_used():
    paths = {path for pattern in SEARCHED for path in ROOT.glob(pattern) if path.is_file()}
    found = []
    for path in sorted(paths - {Path(__file__)}):
        found += hits(str(path.relative_to(ROOT)), path.read_text())
    assert not found, f"{len(found)} words:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "sentence",
    [
        "own storage of keys and values",
        "EMPTY_STORAGE = 3",
        "a row waits for a place",
        "rows that have ended",
        "log-probs of the policy that sampled",
        "the exam's table",
        "what was asked of the model",
        "likeliest tokens",
        "layers look back",
        "a device that tells its memory",
        "it says which rows are free",
        "no, for there is no other",
    ],
)
def test_a_private_word_is_found(sentence):
    assert hits("docs/page.md", sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "gcloud storage rsync, Google Cloud Storage",
        "the weights are updated in place",
        "an example of the KV cache, for which see below",
        "intelligible; foretold; the paper says that both agree",
    ],
)
def test_other_words_are_not(sentence):
    assert not hits("lpo_jax/sampling/batching.py", sentence)
