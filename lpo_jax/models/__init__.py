"""One decoder for several model families: forward pass, log-probs and gradients of groups, weights in and out.

Every parameter is declared in `parameters`, and a family is a set of switches in `config`. `load` opens a model by its
name, and `placement` shards its parameters.
"""

from lpo_jax.models.config import ModelConfig
from lpo_jax.models.load import load_config_and_tokenizer, load_weights

__all__ = ["ModelConfig", "load_config_and_tokenizer", "load_weights"]
