"""Generate the config and the tokenizer of a small transformer that is trained from scratch.

    python scripts/make_micro_model.py configs/micro
    python scripts/make_micro_model.py configs/micro_vision

micro: a Llama model with two layers and 0.2 million parameters for Countdown problems in the `short` template. A token
is a number below 100, one of the template's phrases, or a single character, so the prompt of a problem with three
numbers has about fifteen tokens and its answer about nine.

micro_vision: a Qwen3-VL model with two layers in the decoder and two in the vision tower, 0.3 million parameters, for
the task shapes. A token is one of the task's questions or answers. A picture of 64 x 64 pixels has 8 x 8 patches and 16
tokens.

There are no weights, because `model.init: random` draws them.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lpo_jax.images import ImageProcessor
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.hf import write_configs
from lpo_jax.models.tokenizer import save_tokenizer
from lpo_jax.models.vision_config import VisionConfig
from lpo_jax.tasks.shapes import PREFILL, TEXTS

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


# The vision model: special tokens, the questions and tags of the task shapes, and its answers.
LOOK = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SHAPES = (*(f"{text}\n" for text in TEXTS.values()), PREFILL, "</answer>")
ANSWERS = (*map(str, range(1, 10)), *map(str, range(30, 331, 30)))
VISION_VOCABULARY = (*SPECIAL, *LOOK, *SHAPES, *ANSWERS)

VISION_CONFIG = ModelConfig(
    family="qwen3_vl",
    vocab_size=len(VISION_VOCABULARY),
    width=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_width=24,
    ffn_width=256,
    max_positions=64,
    qk_norm=True,
    tie_embeddings=True,
    mrope=(4, 4, 4),
    mrope_interleaved=True,
    vision=VisionConfig(
        depth=2,
        width=64,
        num_heads=4,
        ffn_width=128,
        start_token=VISION_VOCABULARY.index(LOOK[0]),
        end_token=VISION_VOCABULARY.index(LOOK[1]),
        image_token=VISION_VOCABULARY.index(LOOK[2]),
        video_token=VISION_VOCABULARY.index(LOOK[3]),
        processor=ImageProcessor(
            patch_size=8, min_pixels=64 * 64, max_pixels=64 * 64, mean=(0.5,) * 3, std=(0.5,) * 3
        ),
        num_positions=64,
        deepstack=(0,),
    ),
)


def tokenizer(
    vocabulary: Sequence[str] = VOCABULARY,
    special: Sequence[str] = SPECIAL,
    phrases: Sequence[str] = PHRASES,
    number: str = "[1-9]?[0-9]",
) -> PreTrainedTokenizerFast:
    """Return a tokenizer. Ids: 0 padding, 1 end, 2 unknown, then phrases, characters and numbers.

    Args:
      vocabulary: all tokens by id.
      special: those that no text contains.
      phrases: those that are more than a number or a character.
      number: a regular expression of numbers.
    """
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    words = "|".join(re.sub(r"([\[.?])", r"\\\1", phrase) for phrase in phrases)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{words}|{number}|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
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
    config, made = CONFIG, tokenizer()
    if path.name == "micro_vision":
        config = VISION_CONFIG
        made = tokenizer(VISION_VOCABULARY, (*SPECIAL, *LOOK), SHAPES, "[0-9]+")
    write_configs(path, config, "float32", made)
    save_tokenizer(made, path)
    print(f"wrote {', '.join(sorted(file.name for file in path.iterdir()))} to {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
