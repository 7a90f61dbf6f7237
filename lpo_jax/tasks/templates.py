"""How a row is asked: templates with `{field}` for a row's field, by name or written out; and their undoing.

Files made for other trainers hold their prompts with a template already around the problem; `bare` takes it off, so
that a problem is not asked for an answer in two ways at once.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError, nearest
from lpo_jax.tasks.task import Prompt, Row

# {field} and nothing else: \boxed{} and other braces of a template stay what they are.
FIELD = re.compile(r"\{(\w+)\}")

Template = str | Sequence[Mapping[str, str]]  # text, or chat messages

MATH: Mapping[str, Template] = {
    # verl's, and the LPO paper's.
    "boxed": "{problem} Let's think step by step and output the final answer within \\boxed{}.",
    # Qwen2.5-Math's.
    "qwen": [
        {
            "role": "system",
            "content": "Please reason step by step, and put your final answer within \\boxed{}.",
        },
        {"role": "user", "content": "{problem}"},
    ],
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
    "eurus": [
        {
            "role": "system",
            "content": "\nWhen tackling complex reasoning tasks, you have access to the following actions. Use them "
            "as needed to progress through your thought process.\n\n[ASSESS]\n\n[ADVANCE]\n\n[VERIFY]\n\n[SIMPLIFY]\n\n"
            "[SYNTHESIZE]\n\n[PIVOT]\n\n[OUTPUT]\n\nYou should strictly follow the format below:\n\n[ACTION NAME]\n\n"
            "# Your action step 1\n\n# Your action step 2\n\n# Your action step 3\n\n...\n\n"
            "Next action: [NEXT ACTION NAME]\n\n",
        },
        {"role": "user", "content": _WRITE_PYTHON},
    ],
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
    """The template with each `{field}` replaced by the row's."""
    return FIELD.sub(lambda match: str(row[match[1]]), template)


def prompt_function(
    task: str, template: str, known: Mapping[str, Template], field: str
) -> Callable[[Row], Prompt]:
    """The function from a row to its prompt.

    Args:
      task: whose option it is, for errors.
      template: a name in `known`, or a text with `{field}`.
      known: the task's templates.
      field: of the row; the one that a template asks with.

    Raises:
      UserError: if it is neither.
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


def bare(prompt: Any, known: Mapping[str, Template], field: str) -> Any:
    """The problem inside a prompt: the last user message, without a known template or an R1-style conversation.

    What is no prompt comes back as it is.
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
