"""Tokenizers rebuilt from GGUF metadata, and written and read again."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lpo_jax.errors import UserError
from lpo_jax.models.tokenizer import from_directory, from_gguf, save_tokenizer

TEXTS = [
    "hello world, hello there",
    "12345 + 67 = 6808,  9\t8\n\n 7",
    "naïve 日本語 🙂 ½",
    "<|im_start|>user\nhi<|im_end|>",
    "<think> so </think>",
    "",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def reference():
    """A small byte-level BPE with single digits, trained by the tokenizers library itself."""
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["hello world", "hello there, who is there", "the user is here"] * 5, trainer)
    return backend


def metadata(**changes):
    """The GGUF metadata of that tokenizer, with one token that is matched as a whole but not special."""
    model = json.loads(reference().to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
    base = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": [" ".join(pair) for pair in model["merges"]],
        "token_type": [3 if t in SPECIAL else 4 if t == "<think>" else 1 for t in tokens],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
    }
    named = {f"tokenizer.ggml.{k}": v for k, v in (base | changes).items() if v is not None}
    return named | {"tokenizer.chat_template": TEMPLATE, "general.architecture": "llama"}


def test_ids_equal_the_library_s():
    theirs, ours = reference(), from_gguf(metadata(), "a.gguf")
    theirs.add_tokens(["<think>"])
    for text in TEXTS:
        assert ours(text).input_ids == theirs.encode(text).ids, text
        assert ours.decode(ours(text).input_ids) == text
    assert len(ours(TEXTS[0]).input_ids) < 10  # the merges do merge
    assert ours("<think>").input_ids == [len(ours) - 1]


def test_special_tokens_are_whole_and_named():
    tokenizer = from_gguf(metadata(), "a.gguf")
    ids = tokenizer("<|im_start|>hello<|im_end|>").input_ids
    assert (ids[0], ids[-1]) == (1, 2) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id == 0 and tokenizer.unk_token_id is None
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    unnamed = from_gguf(metadata(padding_token_id=None), "a.gguf")
    ids = unnamed("<|endoftext|><think>x").input_ids
    assert ids[0] == 0 and len(ids) == 3
    assert unnamed.decode(ids, skip_special_tokens=True) == "<think>x"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab  1234½ don't", ["ab", " ", " 1234½", " don", "'t"]),
        ("smollm", "ab  1234½ don't", ["ab", "  ", "1", "2", "3", "4", "½", " don", "'t"]),
        ("llama-bpe", "ab  1234½ DON'T!\n\nx", ["ab", " ", " ", "123", "4½", " DON", "'T", "!\n\n", "x"]),
        (
            "qwen2",
            "ab  1234½ DON'T!\n\nx",
            ["ab", " ", " ", "1", "2", "3", "4", "½", " DON", "'T", "!\n\n", "x"],
        ),
    ],
)
def test_how_text_is_cut(pre, text, pieces):
    backend = from_gguf(metadata(pre=pre), "a.gguf").backend_tokenizer
    spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == pieces


def test_qwen_composes_accents():
    composed, apart = "é", "e\u0301"
    qwen, gpt2 = (from_gguf(metadata(pre=pre), "a.gguf") for pre in ("qwen2", "gpt-2"))
    assert qwen(apart).input_ids == qwen(composed).input_ids
    assert gpt2(apart).input_ids != gpt2(composed).input_ids


def test_llama3_takes_a_whole_token_before_merging():
    # "hello" is in the vocabulary but no merge leads to it.
    merges = [m for m in metadata()["tokenizer.ggml.merges"] if m.replace(" ", "") != "hello"]
    for pre, whole in (("llama-bpe", True), ("qwen2", False)):
        tokenizer = from_gguf(metadata(pre=pre, merges=merges, add_bos_token=False), "a.gguf")
        assert (len(tokenizer("hello").input_ids) == 1) == whole


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({}, False, False),
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"pre": "llama-bpe"}, True, False),  # llama.cpp's rule for files that do not say
        ({"pre": "llama-bpe", "add_bos_token": False}, False, False),
    ],
)
def test_first_and_last_token(changes, first, last, tmp_path):
    tokenizer = from_gguf(metadata(**changes), "a.gguf")
    save_tokenizer(tokenizer, tmp_path)
    for t in (tokenizer, from_directory(tmp_path)):
        ids = t("x").input_ids
        assert (ids[0] == 1, ids[-1] == 2, len(ids)) == (first, last, 1 + first + last)
        assert len(t("x", add_special_tokens=False).input_ids) == 1


def test_sentencepiece_ids(golden):
    data = json.loads((golden / "sentencepiece.json").read_text())
    named = {f"tokenizer.ggml.{key}": data[key] for key in ("tokens", "scores", "token_type")}
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    tokenizer = from_gguf(named | ends | {"tokenizer.ggml.model": "llama"}, "a.gguf")
    for item in data["texts"]:
        ids = tokenizer(item["text"]).input_ids
        assert ids == [1, *item["ids"]], item["text"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == item["text"]
    assert any(x.startswith("<0x") for x in tokenizer.convert_ids_to_tokens(tokenizer("🙂").input_ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "mystery"}, "pre-tokenizer 'mystery' is not supported; have gpt-2, smollm"),
        ({"pre": None}, "pre-tokenizer 'missing'"),
        ({"model": "t5"}, "tokenizer model 't5' is not supported"),
        ({"model": "llama"}, "tokenizer model 'llama' is not supported"),  # no scores
        ({"tokens": None}, "holds no tokenizer"),
        ({"eos_token_id": 400}, "eos_token_id is 400, but there are"),
        ({"tokens": ["a", "b", "a"], "token_type": None, "merges": []}, "names a token twice"),
    ],
)
def test_what_cannot_be_exact_is_refused(changes, message):
    with pytest.raises(UserError, match=f"a.gguf: .*{message}"):
        from_gguf(metadata(**changes), "a.gguf")


def test_out_and_in_again(tmp_path):
    tokenizer = from_gguf(metadata(), "a.gguf")
    save_tokenizer(tokenizer, tmp_path)
    again = from_directory(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template == TEMPLATE
    assert again.special_tokens_map == tokenizer.special_tokens_map
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids


def test_saved_settings_are_read_by_transformers_4_too(tmp_path):
    # v4 knows neither the class TokenizersBackend nor extra_special_tokens as a list.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=reference(), eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    save_tokenizer(tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)
    assert settings["additional_special_tokens"] == ["<|im_start|>"]
    assert "<|im_start|>" in from_directory(tmp_path).all_special_tokens


def test_directory_without_and_with_a_broken_tokenizer(tmp_path):
    assert from_directory(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        from_directory(tmp_path)
