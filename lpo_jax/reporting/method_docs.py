"""The catalogue of methods as Markdown, generated from the rows and the docstrings of their parts: `docs/methods.md`.

Except for short introductions, all text comes from the code, so the page cannot become outdated.
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping

from lpo_jax.objectives import DIVERGENCES, Objective, names, sequence_scores, temperature, token_weights
from lpo_jax.objectives.catalogue import CATALOGUE, MethodRecord
from lpo_jax.objectives.hook_specs import HookSpec
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.vocabulary import words
from lpo_jax.reporting.simplex import DRAWABLE

_INTRODUCTION = """# Methods

This page is generated: `lpo methods --markdown > docs/methods.md`.

A method is a composition of parts:

    grad = sum_k sum_t  W[k,t] * c_k(group) * gate(delta[k,t], c_k) * grad log pi(token)  +  grad of penalties

c_k is the coefficient of response k, a function of its whole group; c < 0 raises the probability of the response. delta
is the log-ratio of a token to the behaviour policy, s_k the mean (or sum) of delta over response k, P = softmax(s),
w\\* the target, and R, mu, sigma are the rewards of the group, their mean and their standard deviation.

s_t are the scores of pi_t, the policy at the start of the update. As in algorithm 1 of the LPO paper, pi_t is the
behaviour policy, so **s_t = 0 in every run** and the target is w\\* = softmax(R / tau). Only callers of the Python API
can pass another pi_t, as `Scored.anchor_logp`.

The options of a method are the fields of its parts, so

    lpo train CONFIG --objective.name=lpo-forward --objective.divergence=js

is a method that no paper describes. The parts and their options are documented [at the end](#parts).

The fidelity grade states what a row was checked against: *paper* (its text), *code* (public code), *note* (a third
party's notes that quote the formulas), *reconstructed* (the abstract only), *derived* (ours). The note of a row lists
what is uncertain.

The picture shows the updates of six methods for three responses with rewards 1, 0.5 and 0. A point of a triangle is a
policy on these responses, an arrow shows where one step moves it, and the line is the path from the behaviour policy. A
projection stops at its target; a policy gradient does not.

![Update fields of six methods on the triangle of three responses](simplex.png)

    lpo simplex --rewards 1,0.5,0 --out docs/simplex.png --methods lpo-forward,lpo-reverse,grpo,\\
    lpo-forward:divergence=js,lpo-forward:target=sparsemax,lpo-pointwise
"""

_DIVERGENCES = """## Divergences

Values of the option `divergence`. All but the last are scaled so that at a high temperature the on-policy coefficients
are those of the policy gradient, c = -A / K, so one learning rate serves all. A new divergence is one Python function;
a config file cannot define one:

    from lpo_jax import objectives as O
    O.get("lpo-forward", divergence=O.f_divergence("mine", "of the ratio t = w* / P", lambda t: (t - 1) ** 2 / (t + 1)))
    O.get("lpo-forward", divergence=O.bregman("mine", "of a probability p", lambda p: p**1.5))

| name | loss | targets with zeros |
|---|---|---|"""

_HOOKS = """## Hooks

Hooks are what the run does for a method around its updates. A step draws prompts and samples them, mends failed groups,
selects the groups to train on (which can take further rounds of prompts that the step has not used yet), annotates
them, and finally replays an earlier batch. The order in which a method lists its hooks has no effect. Pass rates and
PIPO's mean rewards are those of everything that was sampled, before it was mended and selected. If the verifier itself
failed on a response, no hook counts this response as a pass or as a failure.

Hooks of different phases can be combined. A method can have one hook each of the phases draw, mend, select and replay,
and one annotate hook per field. A hook that fills a field requires the setting in the last column.

| hook | phase | fills | required setting |
|---|---|---|---|"""


def markdown() -> str:
    """Return the text of `docs/methods.md`: a table of all methods, then each with its parts and options."""
    records = names()
    lines = [_INTRODUCTION, "| name | what it does | paper | fidelity |", "|---|---|---|---|"]
    for name, record in records.items():
        cells = record["formula"], record["paper"], record["fidelity"]
        lines.append(_row(f"[`{name}`](#{_anchor(name)})", *map(_text, cells)))
    for name, record in records.items():
        lines += ["", *_method(name, record, CATALOGUE[name].objective)]
    lines += ["", _DIVERGENCES]
    for name, divergence in DIVERGENCES.items():
        lines.append(_row(f"`{name}`", _text(divergence.formula), "no" if divergence.full_support else "yes"))
    lines += ["", _HOOKS]
    for word, hook in words("hooks").items():
        assert isinstance(hook, HookSpec)
        setting = f"`{hook.setting}`" if hook.setting else ""
        lines.append(
            _row(
                f"[`{word}`](#{_anchor(type(hook).__name__)})",
                hook.phase.name.lower(),
                *hook.gives or ("",),
                setting,
            )
        )
    lines += [
        "",
        "## Parts",
        "",
        "The parts of the methods, as documented in the code. Attributes are options.",
    ]
    functions = {f.__name__: f for f in (temperature, sequence_scores, token_weights)}
    for heading, subject in ({part.__name__: part for part in _parts()} | functions).items():
        lines += ["", f"### {heading}", "", "```text", inspect.getdoc(subject) or "", "```"]
    return "\n".join(lines) + "\n"


def _method(name: str, record: MethodRecord, objective: Objective) -> list[str]:
    lines = [f"## {name}", "", f"    {record['formula']}", ""]
    lines.append(
        f"{_text(record['paper'])}. Fidelity: {record['fidelity']}. Needs {', '.join(record['needs'])}."
    )
    if record["note"]:
        lines += ["", f"Note: {_text(record['note'])}."]
    lines.append("")
    left = dict(record["options"])
    for part in objective.parts:
        own = {f.name: left.pop(f.name) for f in dataclasses.fields(part) if f.name in left}
        lines.append(f"- {_link(type(part))}{_options(own)}")
    lines.append(f"- the method itself{_options(left)}")
    if objective.needs <= DRAWABLE:
        lines += ["", f"Picture: `lpo simplex --rewards 1,0.5,0 --methods {name} --out {name}.png`"]
    return lines


def _options(options: Mapping[str, object]) -> str:
    return ": " * bool(options) + ", ".join(f"`{key}={json.dumps(value)}`" for key, value in options.items())


def _parts() -> list[type[Part]]:
    """Return every class of part in the catalogue that has its own docstring, in order of first use."""
    used = dict.fromkeys(type(part) for row in CATALOGUE.values() for part in row.objective.parts)
    return [part for part in used if _documented(part)]


def _documented(part: type[Part]) -> bool:
    return not (part.__doc__ or f"{part.__name__}(").startswith(
        f"{part.__name__}("
    )  # the docstring that dataclasses generate


def _link(part: type[Part]) -> str:
    return f"[{part.__name__}](#{_anchor(part.__name__)})" if _documented(part) else part.__name__


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in "-_")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(text: str) -> str:
    return text.replace("*", "\\*").replace("<", "&lt;").rstrip(".")
