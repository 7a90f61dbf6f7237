"""Tokenizers, loaded from a Hugging Face directory or rebuilt from the metadata of a GGUF file.

Both are returned as a `transformers.PreTrainedTokenizerFast`. transformers is imported inside the functions, because
importing it takes a second.
"""

import json
import os
from pathlib import Path
from types import ModuleType

from lpo_jax.errors import UserError
from lpo_jax.types import Json, Tokenizer

# How text is split before merging, by the value of `tokenizer.ggml.pre`. "gpt-2" is GPT-2's rule, which `tokenizers`
# has built in; "digits" separates digits first.
_GPT2, _DIGITS = "gpt-2", "digits"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_SPLITS = {"gpt-2": _GPT2, "smollm": _DIGITS}
_SPLITS |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3)
_SPLITS |= dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2)
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # tokenizer.ggml.token_type


def from_directory(path: Path) -> Tokenizer | None:
    """Load the tokenizer of a Hugging Face directory; None if it has none.

    Raises:
      UserError: the files cannot be read.
    """
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    transformers = _transformers()
    # The serialised file is the tokenizer that the model was trained with. It is rebuilt only if that is missing.
    serialized = (path / "tokenizer.json").exists()
    load = transformers.PreTrainedTokenizerFast if serialized else transformers.AutoTokenizer
    try:
        return load.from_pretrained(path, local_files_only=True)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: the tokenizer cannot be read ({reason})") from None


def from_gguf(metadata: dict[str, Json], where: str) -> Tokenizer:
    """Rebuild the tokenizer of a GGUF file.

    Args:
      metadata: the metadata of the file; the keys `tokenizer.*` are used.
      where: the name of the file, for messages.

    Raises:
      UserError: the kind of tokenizer or pre-tokenizer is not known to be reproduced exactly.
    """
    from tokenizers import AddedToken

    get = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)  # noqa: E731
    tokens, types, model = get("tokens"), get("token_type"), get("model")
    if not tokens:
        raise UserError(f"{where}: holds no tokenizer; use the model's Hugging Face directory")
    types = types or [1] * len(tokens)
    if model == "gpt2":
        backend = _byte_level(tokens, get("merges", []), get("pre", "missing"), where)
    elif model == "llama" and get("scores"):
        backend = _sentencepiece(tokens, get("scores"), types, get("add_space_prefix", True))
    else:
        raise UserError(f"{where}: tokenizer model {model!r} is not supported; have gpt2, llama")
    # These tokens are matched as a whole before the text is split. Their ids stay those of the vocabulary.
    whole = [(text, kind) for text, kind in zip(tokens, types) if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_tokens([AddedToken(t, special=kind == _CONTROL, normalized=False) for t, kind in whole])
    if backend.get_vocab_size() != len(tokens):
        raise UserError(f"{where}: the vocabulary names a token twice; not supported")

    def token(key: str) -> str | None:
        if (i := get(f"{key}_token_id")) is None:
            return None
        if not 0 <= i < len(tokens):
            raise UserError(
                f"{where}: {key}_token_id is {i}, but there are {len(tokens)} tokens; use another file"
            )
        return tokens[i]

    special = {"bos": token("bos"), "eos": token("eos"), "unk": token("unknown"), "pad": token("padding")}
    # As in llama.cpp: without the key, a first token is added in these two cases.
    add_bos = get("add_bos_token", model == "llama" or _SPLITS.get(get("pre")) is _LLAMA3)
    _add_ends(backend, special["bos"] if add_bos else None, special["eos"] if get("add_eos_token") else None)
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": text for name, text in special.items() if text is not None},
    )


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer's files, with the chat template, so that both transformers v4 and v5 read them."""
    tokenizer.save_pretrained(path)
    where = path / "tokenizer_config.json"
    settings = json.loads(where.read_text(encoding="utf-8"))
    # v5 writes a class and a list that v4 does not know. v5 reads the older names too.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    where.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _byte_level(tokens: list[str], merges: list[str], pre: str, where: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if pre not in _SPLITS:
        raise UserError(f"{where}: pre-tokenizer {pre!r} is not supported; have {', '.join(_SPLITS)}")
    split = _SPLITS[pre]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    # In Llama 3, a pre-token that is a token is kept as it is, without merges.
    backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=split is _LLAMA3))  # type: ignore[arg-type]
    if split is _QWEN2:
        backend.normalizer = normalizers.NFC()
    if split in (_GPT2, _DIGITS):
        digits = [pre_tokenizers.Digits(individual_digits=True)] if split is _DIGITS else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        cut = pre_tokenizers.Split(Regex(split), "isolated")
        steps = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens: list[str], scores: list[float], types: list[int], add_space: bool) -> Tokenizer:
    """SentencePiece's BPE: the pair whose union has the highest score merges first; unknown text becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores):
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-score, left, right))
    merges.sort()
    pairs = [(tokens[left], tokens[right]) for _, left, right in merges]
    unknown = next((token for token, kind in zip(tokens, types) if kind == 2), None)
    fallback = _BYTE in types
    backend = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    space = [normalizers.Prepend("▁")] if add_space else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _add_ends(backend: Tokenizer, first: str | None, last: str | None) -> None:
    """Make encoding with special tokens add `first` before and `last` after the text; None adds nothing."""
    from tokenizers import processors

    ends = [(token, backend.token_to_id(token)) for token in (first, last) if token is not None]
    before, after = ([token] if token is not None else [] for token in (first, last))
    single = [*before, "$A", *after]
    pair = [*single, *before, "$B:1", *after]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)


def _transformers() -> ModuleType:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # a missing torch is expected
    import transformers

    return transformers
