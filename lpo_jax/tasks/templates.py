"""Prompt templates, with `{field}` for a field of the row, and their removal from prompts in files.

Prompts in files made for other trainers already have a template around the problem. `bare` removes it, so that a prompt
does not give two instructions for the form of the answer.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from lpo_jax.errors import UserError, nearest
from lpo_jax.tasks.task import Prompt, Row
from lpo_jax.types import Json

# Matches only {field}: \boxed{} and other braces in a template are kept.
FIELD = re.compile(r"\{(\w+)\}")

Template = str | Sequence[Mapping[str, str]]  # text, or chat messages


def _chat(system: str, user: str) -> Template:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


MATH: Mapping[str, Template] = {
    # verl's, and the LPO paper's.
    "boxed": "{problem} Let's think step by step and output the final answer within \\boxed{}.",
    # Qwen2.5-Math's.
    "qwen": _chat("Please reason step by step, and put your final answer within \\boxed{}.", "{problem}"),
    "prime": "{problem}\n\nPresent the answer in LaTex format: \\boxed{Your answer}",
}

GSM8K: Mapping[str, Template] = {
    # verl's.
    "hashes": '{question} Let\'s think step by step and output the final answer after "####".',
    "boxed": "{question} Let's think step by step and output the final answer within \\boxed{}.",
}

_INSTRUCTION = (
    "Write Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."
)
_WRITE_PYTHON = "{problem}\n\n" + _INSTRUCTION

CODE: Mapping[str, Template] = {
    "prime": _WRITE_PYTHON,
    # PRIME's own training prompt: the same, after Eurus-2's system message.
    "eurus": _chat(
        "\nWhen tackling complex reasoning tasks, you have access to the following actions. Use them "
        "as needed to progress through your thought process.\n\n[ASSESS]\n\n[ADVANCE]\n\n[VERIFY]\n\n[SIMPLIFY]\n\n"
        "[SYNTHESIZE]\n\n[PIVOT]\n\n[OUTPUT]\n\nYou should strictly follow the format below:\n\n[ACTION NAME]\n\n"
        "# Your action step 1\n\n# Your action step 2\n\n# Your action step 3\n\n...\n\n"
        "Next action: [NEXT ACTION NAME]\n\n",
        _WRITE_PYTHON,
    ),
}

GEOMETRY: Mapping[str, Template] = {
    # verl's, and the LPO paper's; the images come before it.
    "think": "{problem} You FIRST think about the reasoning process as an internal monologue and then provide the "
    "final answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put "
    "in \\boxed{}.",
    "boxed": MATH["boxed"],
}

GYM: Mapping[str, Template] = {
    # reasoning-gym's own instruction, after the question.
    "tags": "{question}\n\nOnce you have thought about the reasoning process, provide the answer in the following "
    "format:\n<answer>answer here</answer>\nDo not explain your reasoning inside the answer tags, provide only the "
    "final answer. When an example is provided, you should strictly follow the format of the output/answer in that "
    "example.\n",
    "short": "{question}\nPut the answer between <answer> and </answer>.\n",
}


def fill(template: str, row: Row) -> str:
    """Replace each `{field}` in a template by the row's value."""
    return FIELD.sub(lambda match: str(row[match[1]]), template)


def prompt_function(
    task: str, template: str, known: Mapping[str, Template], field: str
) -> Callable[[Row], Prompt]:
    """Return the function that maps a row to its prompt.

    Args:
      task: the name of the task, for error messages.
      template: a name in `known`, or a text with `{field}`.
      known: the task's templates by name.
      field: the field of the row that the template contains.

    Raises:
      UserError: if the template is neither a known name nor a text with `{field}`.
    """
    slot = f"{{{field}}}"
    chosen = known.get(template, template)
    if isinstance(chosen, str):
        if template not in known and FIELD.findall(template) != [field]:
            raise UserError(
                f"task {task}: unknown template {template!r}{nearest(template, known)}; known: {', '.join(known)}, or "
                f"write one with {slot} in it once"
            )
        return lambda row: chosen.replace(slot, row[field])
    return lambda row: [
        {**message, "content": message["content"].replace(slot, row[field])} for message in chosen
    ]


def bare(prompt: Json, known: Mapping[str, Template], field: str) -> Json:
    """Return the problem inside a prompt: the last user message, without a known template or an R1-style conversation.

    A value that is not a prompt is returned unchanged.
    """
    if isinstance(prompt, list) and all(isinstance(message, Mapping) for message in prompt):
        prompt = next((m.get("content") for m in reversed(prompt) if m.get("role") == "user"), prompt)
    if not isinstance(prompt, str):
        return prompt
    if "\nUser: " in prompt and "\nAssistant:" in prompt:
        prompt = prompt.partition("\nUser: ")[2].rpartition("\nAssistant:")[0]
    for template in known.values():
        wrapped = template if isinstance(template, str) else template[-1]["content"]
        before, _, after = wrapped.partition(f"{{{field}}}")
        if prompt.startswith(before) and prompt.endswith(after):
            prompt = prompt[len(before) : len(prompt) - len(after)]
    return prompt
