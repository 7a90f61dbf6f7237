"""A tiny model, its tokenizer, and a task that it can learn."""

import dataclasses

import numpy as np

from lpo_jax.models import parameters
from lpo_jax.models.config import ModelConfig

LETTERS = "0123456789+-*= abcdefghijklmnopqrstuvwxyz<>/,."

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=3 + len(LETTERS),
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=48,
    max_positions=128,
    qk_norm=True,
    tie_embeddings=True,
)
# The model of whole runs, whose sampling programs have a copy of every layer to compile.
RUN_CONFIG = dataclasses.replace(CONFIG, num_layers=1)


def random_params(config, scale=1.0):
    """Draw the parameters of a new model, times `scale`, in NumPy: nothing is compiled."""
    # The errors of float32 have a long tail: with seed 4, one log-prob of test_step.py is at its bound.
    rng = np.random.default_rng(3)

    def draw(parameter):
        shape = parameter.shape(config)
        if parameter.kind in ("norm", "bias"):
            return np.full(shape, scale * (parameter.kind == "norm"), np.float32)
        return (scale * rng.normal(0, 0.02, shape)).astype(np.float32)

    return parameters.tree_of(config, draw)


# Prompts differ in length. The reward is the fraction of digits in the response: it varies, and it can be learned.
VERIFIER = """
from lpo_jax.rewards import Verdict

def dataset(split):
    first, count = {"train": (0, 24), "heldout": (100, 8)}[split]
    return [{"n": n, "answer": "7" * (1 + n % 4), "hints": ["7"]} for n in range(first, first + count)]

def prompt(row):
    return "say " + "x" * (row["n"] % 7) + str(row["n"])

def solution(row):
    return row["answer"]

def verify(response, row):
    digits = sum(c.isdigit() for c in response) / max(len(response), 1)
    return Verdict(digits, "pass" if digits >= 0.5 else "wrong", {"length": len(response), "answer": response[:1]})

def flawed(response, row):
    return len(response) % 2 == 0

def wrong_steps(response, row):
    return Verdict(1.0, "wrong", {"wrong": "0:2"})
"""


def character_tokenizer():
    """A tokenizer with one token per character; id 0 is padding, 1 ends a response, 2 is unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def run_values(output, model, task):
    """The plain values of a config that trains in seconds."""
    return {
        "output": str(output),
        "model": {"path": str(model)},
        "task": {"name": "python", "file": str(task)},
        "objective": {"name": "lpo-forward"},
        "sampling": {"num_responses": 4, "max_tokens": 6, "max_prompt_tokens": 16},
        "training": {"steps": 4, "prompts_per_step": 4, "updates_per_step": 2, "token_budget": 64},
        "optimizer": {"learning_rate": 2e-2, "weight_decay": 0.0},
        "evaluation": {"every": 2, "problems": 6},
        "checkpoint": {"every": 1},
        "rewards": {"workers": 1},
        "mesh": {"devices": 1},  # of the eight CPU devices; tests/parallel uses more
    }


def vision_tokenizer():
    """A tokenizer with one token per character and those of images; ids 0 to 2 are as in `character_tokenizer`.

    It has 64 ids, as many as the golden vision models; 60 to 63 are the start and the end of an image and the
    placeholders of images and videos.
    """
    tokenizer = character_tokenizer()
    filler = [f"<{i}>" for i in range(len(tokenizer), 60)]
    tokenizer.add_tokens([*filler, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    tokenizer.chat_template = VISION_TEMPLATE
    return tokenizer


VISION_TEMPLATE = """{%- for message in messages -%}
{{ message.role[:1] }}{{ ":" }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == "video" -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "a:" }}{%- endif -%}"""
