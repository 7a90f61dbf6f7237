"""The size of microbatches, and whether layers are rematerialised in the backward pass, by the available memory.

Axes: K responses · S prompt tokens · T response tokens.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lpo_jax.config import Config
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.packing import full_splits
from lpo_jax.models.parameters import axis_sizes, declared
from lpo_jax.parallel import hosts
from lpo_jax.parallel.sharding import current_mesh

# Share for saved activations of the memory left by parameters, gradient and optimizer state; the rest is for logits,
# attention and the sampler.
SHARE = 0.5
# Minimum length of a row that was shortened: each row reads all weights and adds to the whole gradient.
SHORTEST = 2048


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """The resolved values of `training.token_budget` and `training.remat`.

    Attributes:
      token_budget: maximum number of tokens in a row.
      remat: whether the backward pass recomputes layers.
    """

    token_budget: int
    remat: bool


def fit_microbatch(config: Config, model: ModelConfig, state_bytes: int) -> Microbatch:
    """Choose the microbatch: as configured, or by the available memory for `training.remat: auto`.

    With `auto`, activations are kept if they are estimated to fit. If they do not fit at the configured token budget,
    rows of a half, a quarter, ... of the budget are tried: their only cost is that a prompt runs once with each split
    of its group, whereas rematerialisation costs a third of the arithmetic. If parameters are sharded (fsdp), rows are
    not shortened, because every microbatch gathers all parameters.

    All hosts get the same result. If free memory cannot be read, the function assumes that there is not enough.

    Args:
      state_bytes: bytes of parameters, gradient and optimizer state on all devices together.
    """
    configured, setting = config.training.token_budget, config.training.remat
    if setting != "auto":
        return Microbatch(configured, setting)
    mesh = current_mesh()
    fsdp, tensor = (1, 1) if mesh is None else (mesh.shape["fsdp"], mesh.shape["tensor"])
    left = min(hosts.gather(free_memory())) - state_bytes / (fsdp * tensor)

    K, S, T = config.sampling.num_responses, config.sampling.max_prompt_tokens, config.sampling.max_tokens
    run = lambda budget: full_splits(K, S, T, budget) * S + K * T  # noqa: E731 - tokens of a group
    update, budget = most_update_tokens(config), configured
    while kept_bytes(model, max(min(budget, update), S + T), config.model.dtype) > SHARE * left:
        budget //= 2
        if fsdp > 1 or budget < max(SHORTEST, S + T) or 3 * run(budget) > 4 * run(configured):
            return Microbatch(configured, remat=True)
    return Microbatch(budget, remat=False)


def most_update_tokens(config: Config) -> int:
    """Count the tokens of a run's largest update (RL or warm start): prompts once, all sequences at full length."""
    training, sampling, warm = config.training, config.sampling, config.warm_start
    S, T = sampling.max_prompt_tokens, sampling.max_tokens
    update = training.prompts_per_step // training.updates_per_step * (S + sampling.num_responses * T)
    return max(update, warm.batch_size * (S + T) if warm.steps else 0)


def kept_bytes(model: ModelConfig, tokens: int, dtype: Any) -> int:
    """Bytes of the activations saved for the backward pass, over all layers.

    These are the outputs of matrix products, of attention (to the prompt and to the response) and the layer's input.
    """
    sizes = axis_sizes(model)
    products = sum(math.prod(sizes[a] for a in p.outputs) for p in declared(model) if p.kind == "matrix")
    width = products + 2 * model.num_heads * model.head_width + model.width
    return model.num_layers * tokens * width * jnp.dtype(dtype).itemsize


def free_memory() -> int:
    """Free bytes of the first local device, or of the host if devices do not report them; 0 if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    table = Path("/proc/meminfo")
    if not table.exists():
        return 0
    lines = dict(line.split(":") for line in table.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
