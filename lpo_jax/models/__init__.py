"""Models: one decoder for several families, and how its weights come in and go out."""

from lpo_jax.models.config import ModelConfig
from lpo_jax.models.load import load_config_and_tokenizer, load_weights

__all__ = ["ModelConfig", "load_config_and_tokenizer", "load_weights"]
