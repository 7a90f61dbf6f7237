"""Prompts from chat templates, ids without a row in the embedding, end tokens."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lpo_jax import load_model
from lpo_jax.errors import UserError
from lpo_jax.models import load_config_and_tokenizer
from lpo_jax.models.hf import save_hf
from lpo_jax.models.text import ModelTokenizer
from lpo_jax.rollout.encode import encode_solution
from lpo_jax.sampling.text import encode

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3's: an answer at the end gets a thought, and thinking can be switched off.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.strip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
# Llama 2's and Mistral's: no prompt for an answer, and a space before it.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}


def byte_tokenizer(template=CHATML, extra=(), **named):
    """A tokenizer with one token for each byte, ids 0 to 255, then <end>, 256, and `extra`."""
    backend = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<end>", *extra)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)


def prompts(template=CHATML, **arguments):
    tokenizer = ModelTokenizer(byte_tokenizer(template), "a-model", 300)
    return tokenizer.with_arguments(arguments) if arguments else tokenizer


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (CHATML, [USER], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, [USER, answer("<a>")], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<a>"),
        (QWEN3, [USER, answer("<a>")], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<a>"),
        (QWEN3, [USER, answer("<a>\n")], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<a>\n"),
        (
            TRIMMING,
            [USER, answer("\n<a>\n")],
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n\n<a>\n",
        ),
        (
            QWEN3,
            [USER, answer("so"), USER, answer("<a>")],
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n<a>",
        ),
        (BRACKETS, [USER], "[INST] hi [/INST]"),
        (BRACKETS, [USER, answer("<a>\n")], "[INST] hi [/INST] <a>\n"),
    ],
)
def test_an_answer_that_is_begun_stands_behind_the_prompt_for_it(template, messages, text):
    tokenizer = prompts(template)
    assert tokenizer.render(messages) == text
    assert tokenizer.decode(encode(tokenizer, messages)) == text


def test_template_arguments_reach_the_template():
    thought = "<think>\n\n</think>\n\n"
    assert prompts(QWEN3, enable_thinking=False).render([USER]).endswith("assistant\n" + thought)
    assert prompts(QWEN3, enable_thinking=False).render([USER, answer("<a>")]).endswith(thought + "<a>")
    assert prompts(QWEN3, enable_thinking=True).render([USER]) == prompts(QWEN3).render([USER])
    for name in ("enable_thinkin", "messages", "add_generation_prompt", "tokenize"):
        with pytest.raises(UserError, match=f"a-model: its chat template does not use the argument '{name}'"):
            prompts(QWEN3, **{name: False})
    with pytest.raises(UserError, match="did you mean 'enable_thinking'"):
        prompts(QWEN3, enable_thinkin=False)
    with pytest.raises(UserError, match="no chat template"):
        prompts(None, enable_thinking=False)


def test_one_of_several_templates_is_chosen_by_name():
    several = {"plain": CHATML, "brackets": BRACKETS}
    with pytest.raises(
        UserError, match=r"several chat templates \(.*\) and no default; set model.template_arg"
    ):
        prompts(several).render([USER])
    assert prompts(several, chat_template="brackets").render([USER]) == "[INST] hi [/INST]"
    assert prompts(CHATML, chat_template=BRACKETS).render([USER]) == "[INST] hi [/INST]"
    for own, have in ((several, "; have plain, brackets;"), (CHATML, "; a template itself")):
        with pytest.raises(UserError, match=f"has no chat template 'bracket'{have}"):
            prompts(own, chat_template="bracket")
    assert prompts({**several, "default": QWEN3}).render([USER]) == prompts(QWEN3).render([USER])


DATED = "{% set d = strftime_now('%d %b %Y') %}Today is {{ d }}, {{ strftime_now('%Y-%m-%d') }}.\n" + CHATML


def test_the_date_of_a_prompt_does_not_depend_on_the_day():
    text = prompts(DATED).render([USER])
    assert text == "Today is 26 Jul 2024, 2024-07-26.\n" + prompts().render([USER])


REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            REFUSING + CHATML,
            [SYSTEM, USER],
            r"does not take messages of the roles system, user \(System role not supported\); ask without a system",
        ),
        (
            "{{ messages[1].content }}",
            [USER],
            r"roles user \(.*has no element 1\); give what it lacks in model.temp",
        ),
        (
            "{{ messages[0].content + 1 }}",
            [USER],
            r"roles user \(can only concatenate str.*\); ask in the way",
        ),
        ("x\n{% if %}", [USER], r"its chat template is broken \(line 2: "),
        ("{{ strftime_now('%d') }}\n{% if %}", [USER], r"its chat template is broken \(line 2: "),
        (None, [USER], "no chat template; use raw prompts"),
        (
            CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
            [USER, answer("<think>\nso")],
            "begins each answer with <think> itself; leave <think> out of the prefill",
        ),
        ("{{ messages | length }}", [USER, answer("a")], "so that no answer can be begun with a prefill"),
    ],
)
def test_a_template_that_does_not_take_the_messages_is_one_line(template, messages, message):
    with pytest.raises(UserError, match=f"^a-model: .*{message}") as error:
        prompts(template).render(messages)
    assert "\n" not in str(error.value)


def test_an_id_without_a_row_is_refused_where_it_occurs():
    larger = ModelTokenizer(byte_tokenizer(extra=["<x>", "<y>"]), "a-model", 258)
    assert encode(larger, "a<x>") == [*larger.tokenizer.encode("a"), 257]  # a tokenizer may have more tokens
    with pytest.raises(
        UserError, match=r"a-model: token '<y>' \(id 258\) has no row in the embedding, which has 258"
    ):
        encode(larger, "a<y>")
    with pytest.raises(UserError, match="id 258"):
        encode(larger, [{"role": "user", "content": "<y>"}])


@pytest.fixture
def directory(tmp_path, tiny_config, tiny_params):
    """A model whose tokenizer has more tokens than the embedding has rows."""
    save_hf(tmp_path / "model", tiny_config, tiny_params, byte_tokenizer(eos_token="!"), eos_ids=[1])
    return tmp_path / "model"


def edit(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def test_logits_can_be_traced(tiny_model):
    model = load_model(tiny_model)
    tokens = jnp.array([[3, 4, 5]])
    chex.assert_trees_all_close(jax.jit(model.logits)(tokens), model.logits(tokens), atol=1e-4)


def test_logits_of_ids_without_a_row_are_refused(tiny_model):
    model = load_model(tiny_model)
    V = model.config.vocab_size
    for wrong in (V, -1, 2**31):
        with pytest.raises(
            UserError, match=rf"id {wrong} \(row 1, place 0\) has no row in the embedding, which has {V}"
        ):
            model.logits([[0, 1], [wrong, 1]])
    padded = model.logits([[0, 1], [-100, 1]], mask=[[1, 1], [0, 1]])
    np.testing.assert_array_equal(padded[1, 1], model.logits([[0, 1], [2, 1]], mask=[[1, 1], [0, 1]])[1, 1])


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        (1, None, None, (1,)),
        (None, [2, 1], None, (2, 1)),
        ("#", None, None, (2,)),  # as text
        (["#", 3], 2, "!", (2, 3, 0)),
        (None, None, "!", (0,)),
        (None, None, None, ()),
    ],
)
def test_end_tokens_are_found_wherever_one_is_named(generation, config, tokenizer, expected, directory):
    edit(directory / "generation_config.json", eos_token_id=generation)
    edit(directory / "config.json", eos_token_id=config)
    edit(directory / "tokenizer_config.json", eos_token=tokenizer)
    _, found, eos_ids = load_config_and_tokenizer(directory)
    own = [] if tokenizer is None else [0]
    assert eos_ids == expected and found.eos_token_id == next(iter([*own, *expected]), None)


def test_an_end_token_without_a_row_is_refused(directory):
    edit(directory / "tokenizer_config.json", eos_token="<end>")
    with pytest.raises(
        UserError, match="the end token has the id 256, but the embedding has 49 rows; correct"
    ):
        load_config_and_tokenizer(directory)


@pytest.mark.parametrize("wrong", ["<nothing>", True, 1.5, -1, {"id": 1}])
def test_an_end_token_that_is_none_is_one_line(wrong, directory):
    edit(directory / "config.json", eos_token_id=wrong)
    with pytest.raises(UserError, match=r"model: (eos_token_id|the end token)"):
        load_config_and_tokenizer(directory)


def test_a_solution_ends_with_the_end_token_of_the_model():
    class Task:
        @staticmethod
        def solution(row):
            return row["answer"]

    raw = byte_tokenizer()
    ids = raw.encode("7")
    assert encode_solution(Task, ModelTokenizer(raw, "m", 300, (5, 6)), {"answer": "7"}) == [*ids, 5]
    named = ModelTokenizer(byte_tokenizer(eos_token="<end>"), "m", 300, (5, 256))
    assert encode_solution(Task, named, {"answer": "7"}) == [*ids, 256]
    with pytest.raises(UserError, match="the model has no end token"):
        encode_solution(Task, ModelTokenizer(raw, "m", 300), {"answer": "7"})
