"""Whether what the backward pass needs of each layer is kept or computed again, by the memory at hand.

Axes: L layers · D width · H query heads · G key/value heads · N head width · F ffn.
"""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lpo_jax.config import Config
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.sharding import current_mesh
from lpo_jax.scale import hosts

# Of the memory that parameters, gradient and optimizer leave; the rest is for logits, attention and the sampler.
SHARE = 0.5
# Bytes of one trained parameter: float32 weight, gradient and two moments.
STATE_BYTES = 16


def recomputes(
    setting: bool | Literal["auto"], model: ModelConfig, row: int, dtype: Any, trained: int
) -> bool:
    """What `training.remat` comes to: "auto" recomputes layers only where keeping their products may not fit.

    The same on all hosts. What a machine does not tell of its memory is taken for too little.

    Args:
      row: tokens of a packed row, of which a device runs one at a time.
      trained: number of trained parameters.
    """
    if setting != "auto":
        return setting
    mesh = current_mesh()
    parts = 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]
    left = min(hosts.gather(free_memory())) - STATE_BYTES * trained / parts
    return kept_bytes(model, row, dtype) > SHARE * left


def most_update_tokens(config: Config) -> int:
    """Tokens of a run's largest update, of RL or of its warm start: every prompt once, everything at full length."""
    training, sampling, warm = config.training, config.sampling, config.warm_start
    S, T = sampling.max_prompt_tokens, sampling.max_tokens
    update = training.prompts_per_step // training.updates_per_step * (S + sampling.num_responses * T)
    return max(update, warm.batch_size * (S + T) if warm.steps else 0)


def kept_bytes(model: ModelConfig, tokens: int, dtype: Any) -> int:
    """Of the products' and attention's outputs (to the prompt and to the response itself), and of what enters a layer,
    for all L layers."""
    heads = (3 * model.num_heads + 2 * model.num_kv_heads) * model.head_width
    width = 3 * model.width + heads + 2 * model.ffn_width
    return model.num_layers * tokens * width * jnp.dtype(dtype).itemsize


def free_memory() -> int:
    """Bytes free on the first device of this process, or on the machine where devices do not count them."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    table = Path("/proc/meminfo")
    if not table.exists():
        return 0
    lines = dict(line.split(":") for line in table.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
