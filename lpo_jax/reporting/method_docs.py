"""The catalogue of methods as Markdown, from the rows and the docstrings of their parts: `docs/methods.md`.

Beside the tables nothing is written here that the program does not know itself, so it cannot fall behind.
"""

import dataclasses
import inspect
import json
from typing import Any

from lpo_jax.objectives import DIVERGENCES, Objective, names, sequence_scores, temperature, token_weights
from lpo_jax.objectives.catalogue import CATALOGUE
from lpo_jax.objectives.part import Part
from lpo_jax.objectives.vocabulary import words
from lpo_jax.reporting.simplex import DRAWABLE

_INTRODUCTION = """# Methods

This page is generated: `lpo methods --markdown > docs/methods.md`.

A method is a composition of parts:

    grad = sum_k sum_t  W[k,t] * c_k(group) * gate(delta[k,t], c_k) * grad log pi(token)  +  grad of penalties

c_k is the coefficient of response k, a function of its whole group; c < 0 makes the response likelier. delta is a
token's log-ratio to the policy that sampled, s_k the mean (or sum) of a response's, P = softmax(s), w\\* the target,
and R, mu, sigma the group's rewards, their mean and deviation. A method's options are the fields of its parts, so that

    lpo train CONFIG --objective.name=lpo-forward --objective.divergence=js

is one that no paper has. What the parts and their options mean stands [at the end](#parts).

Fidelity says what a row was checked against: *paper* (its text), *code* (public code), *note* (a third party's notes
that quote the formulas), *reconstructed* (the abstract alone), *derived* (ours). Its note says what is uncertain.

Below, the updates of six methods for three responses with rewards 1, 0.5 and 0. A point of a triangle is a policy on
these responses, an arrow says where one step takes it, and the line is the way from the policy that sampled. A
projection stops at its target; a policy gradient passes by.

![Update fields of six methods on the triangle of three responses](simplex.png)

    lpo simplex --rewards 1,0.5,0 --out docs/simplex.png --methods lpo-forward,lpo-reverse,grpo,\\
    lpo-forward:divergence=js,lpo-forward:target=sparsemax,lpo-pointwise
"""

_DIVERGENCES = """## Divergences

Words of the option `divergence`. All but the last are scaled so that for a high temperature the on-policy coefficients
are those of the policy gradient, c = -A / K, and one learning rate serves all. One of your own is one function, and
comes from Python, not from a config file:

    from lpo_jax import objectives as O
    O.get("lpo-forward", divergence=O.f_divergence("mine", "of the ratio t = w* / P", lambda t: (t - 1) ** 2 / (t + 1)))
    O.get("lpo-forward", divergence=O.bregman("mine", "of a probability p", lambda p: p**1.5))

| word | loss | targets with zeros |
|---|---|---|"""

_HOOKS = """## Hooks

What a method asks of the run around its updates. A step draws prompts and samples them, mends failed groups, selects
the groups to learn from (which may take further rounds of prompts that the step has not seen yet), annotates them, and
last replays an earlier batch, whatever the order in which a method lists its hooks. Pass rates and PIPO's mean
rewards are of everything that was sampled, before it was mended and selected. A response on which the verifier failed
counts neither as a pass nor as a failure, in any hook.

Hooks of different phases can be combined. Of the phases draw, mend, select and replay a method holds one hook each, and
of annotate one for each field. A hook that gives a field works with the setting beside it, and is refused without.

| hook | phase | gives | set with it |
|---|---|---|---|"""


def markdown() -> str:
    """All methods in a table, then one by one with their parts and options: the text of `docs/methods.md`."""
    records = names()
    lines = [_INTRODUCTION, "| name | what it does | paper | fidelity |", "|---|---|---|---|"]
    for name, record in records.items():
        cells = (_text(record[key]) for key in ("formula", "paper", "fidelity"))
        lines.append(_row(f"[`{name}`](#{_anchor(name)})", *cells))
    for name, record in records.items():
        lines += ["", *_method(name, record, CATALOGUE[name].objective)]
    lines += ["", _DIVERGENCES]
    for word, divergence in DIVERGENCES.items():
        lines.append(_row(f"`{word}`", _text(divergence.formula), "no" if divergence.full_support else "yes"))
    lines += ["", _HOOKS]
    for word, hook in words("hooks").items():
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
        "What methods are made of, as the code documents it. Attributes are options.",
    ]
    for subject in (*_parts(), temperature, sequence_scores, token_weights):
        lines += ["", f"### {subject.__name__}", "", "```text", inspect.getdoc(subject), "```"]
    return "\n".join(lines) + "\n"


def _method(name: str, record: dict[str, Any], objective: Objective) -> list[str]:
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


def _options(options: dict[str, Any]) -> str:
    return ": " * bool(options) + ", ".join(f"`{key}={json.dumps(value)}`" for key, value in options.items())


def _parts() -> list[type[Part]]:
    """Every class of part in the catalogue that has a text of its own, in order of first use."""
    used = dict.fromkeys(type(part) for row in CATALOGUE.values() for part in row.objective.parts)
    return [part for part in used if _documented(part)]


def _documented(part: type[Part]) -> bool:
    return not (part.__doc__ or f"{part.__name__}(").startswith(
        f"{part.__name__}("
    )  # as dataclasses' own does


def _link(part: type[Part]) -> str:
    return f"[{part.__name__}](#{_anchor(part.__name__)})" if _documented(part) else part.__name__


def _anchor(heading: str) -> str:
    """What GitHub links a heading by."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in "-_")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(text: str) -> str:
    return text.replace("*", "\\*").replace("<", "&lt;").rstrip(".")
