"""Make `configs/micro/`: the config and the tokenizer of a small transformer that is trained from scratch.

    python scripts/make_micro_model.py configs/micro

It is a Llama of two layers and 0.2 million parameters for Countdown problems in the `short` template. A token is a
number below 100, one of the template's phrases, or a single character: a problem of three numbers takes about fifteen
tokens, its solution about nine. There are no weights; `model.init: random` draws them.
"""

import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lpo_jax.models.config import ModelConfig
from lpo_jax.models.hf import write_configs
from lpo_jax.models.tokenizer import save_tokenizer

SPECIAL = ("<pad>", "<end>", "<unk>")
PHRASES = ("Using the numbers [", ", ", "], create an equation that equals ", ".\n", "<answer>", "</answer>")
CHARACTERS = "+-*/()= "
NUMBERS = tuple(map(str, range(100)))
VOCABULARY = (*SPECIAL, *PHRASES, *CHARACTERS, *NUMBERS)

CONFIG = ModelConfig(
    family="llama",
    vocab_size=len(VOCABULARY),
    width=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_width=24,
    ffn_width=256,
    max_positions=64,
    tie_embeddings=True,
)


def tokenizer() -> PreTrainedTokenizerFast:
    """0 pads, 1 ends, 2 is unknown; then phrases, characters and numbers."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    phrases = "|".join(phrase.replace("[", r"\[").replace(".", r"\.") for phrase in PHRASES)
    number = r"[1-9]?[0-9]"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{phrases}|{number}|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    pad, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        model_max_length=CONFIG.max_positions,
        clean_up_tokenization_spaces=False,
    )


def main(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    write_configs(path, CONFIG, "float32", made)
    save_tokenizer(made, path)
    print(f"wrote {', '.join(sorted(file.name for file in path.iterdir()))} to {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
