"""Load weights, config and tokenizer of a model that is named by one string."""

import os
from collections.abc import Mapping
from typing import Any

from lpo_jax.errors import UserError
from lpo_jax.models import decoder, layout
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.gguf import GgufFile
from lpo_jax.models.hf import HfDirectory
from lpo_jax.models.sources import locate
from lpo_jax.models.text import ModelTokenizer


def load_weights(name: str | os.PathLike, dtype: str = "float32", shardings: Any = None) -> decoder.Params:
    """The parameters alone of a model that is named as for `lpo_jax.load_model`."""
    check_dtype(dtype)
    return open_source(name).params(dtype, shardings)


def load_config_and_tokenizer(
    name: str | os.PathLike, weights: bool = False, template_arguments: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, ModelTokenizer | None, tuple[int, ...]]:
    """Config, tokenizer and end-token ids of a model, without its parameters.

    Args:
      name: as for `lpo_jax.load_model`.
      template_arguments: for the chat template.
      weights: whether the weights of an `hf:` model, which will be loaded later, are downloaded now. Whether a model
        whose config ties the head to the embedding has a head of its own shows in the weights alone.
    """
    source = open_source(name, weights)
    return source.config, *read_tokenizer(source, template_arguments or {})


def check_dtype(dtype: str) -> None:
    """Raises `UserError` if parameters cannot be loaded in this dtype."""
    if dtype not in layout.DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; have {', '.join(layout.DTYPES)}")


def open_source(name: str | os.PathLike, weights: bool = True) -> HfDirectory | GgufFile:
    """Opens the files of a model without reading its weights.

    Args:
      name: as for `lpo_jax.load_model`.
      weights: whether the weights of an `hf:` model are downloaded.

    Raises:
      UserError: the model cannot be found, downloaded or opened.
    """
    name = os.fspath(name)
    path = locate(name, weights)
    if not path.is_dir():
        return GgufFile.open(path)
    return HfDirectory.open(path, weights or not name.startswith("hf:"))


def read_tokenizer(
    source: HfDirectory | GgufFile, template_arguments: Mapping[str, Any]
) -> tuple[ModelTokenizer | None, tuple[int, ...]]:
    """The tokenizer, and the end-token ids that the configs and the tokenizer name, in that order."""
    own, model, V = source.tokenizer(), str(source.path), source.config.vocab_size
    named = [*source.eos_ids(), getattr(own, "eos_token_id", None)]
    eos_ids = tuple(dict.fromkeys(_eos_id(model, eos, own, V) for eos in named if eos is not None))
    if own is None:
        return None, eos_ids
    return ModelTokenizer(own, model, V, eos_ids).with_arguments(template_arguments), eos_ids


def _eos_id(model: str, eos: Any, tokenizer: Any, vocab_size: int) -> int:
    """The id of an end token that is given as an id or as text.

    Raises:
      UserError: there is no such token, or the embedding has no row for it, so that no response could end with it.
    """
    if isinstance(eos, str):
        known = tokenizer.get_vocab() if tokenizer is not None else {}
        if eos not in known:
            raise UserError(
                f"{model}: eos_token_id is {eos!r}, which is no token of its tokenizer; set it to an id"
            )
        eos = known[eos]
    if type(eos) is not int:
        raise UserError(
            f"{model}: eos_token_id holds {eos!r}; set it to the id of a token, or to a list of ids"
        )
    if not 0 <= eos < vocab_size:
        raise UserError(
            f"{model}: the end token has the id {eos}, but the embedding has {vocab_size} rows; correct "
            "eos_token_id in config.json and generation_config.json, or eos_token in tokenizer_config.json"
        )
    return eos
