"""Eight CPU devices and tiny models for every test; set before jax starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import init_params

TINY = ModelConfig(
    family="qwen3",
    vocab_size=97,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=48,
    max_positions=256,
    qk_norm=True,
    tie_embeddings=True,
)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def tiny_params():
    # Large enough weights that logits differ by several nats: a flat distribution would hide mistakes.
    return jax.tree.map(lambda p: 3 * p, init_params(TINY, jax.random.key(0)))
