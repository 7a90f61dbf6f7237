"""The choice of token budget and rematerialisation by the free memory.

Axes: K responses · S prompt tokens · T response tokens.
"""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lpo_jax.config import Config
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.packing import full_splits
from lpo_jax.models.parameters import axis_sizes, declared
from lpo_jax.parallel import hosts
from lpo_jax.parallel.sharding import current_mesh

# The share of the memory left by parameters, gradient and optimizer that saved activations may take. The rest is for
# logits, attention and the sampler.
SHARE = 0.5
# The fewest tokens of a shortened row: each row reads all weights and accumulates the whole gradient.
SHORTEST = 2048


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """The resolved `training.token_budget` and `training.remat`.

    Attributes:
      token_budget: the most tokens in a row.
      remat: whether the backward pass recomputes layers.
    """

    token_budget: int
    remat: bool


def fit_microbatch(config: Config, model: ModelConfig, state_bytes: int) -> Microbatch:
    """Resolve token budget and rematerialisation; `training.remat: auto` saves activations if they fit.

    If they do not fit at the budget, they may fit in rows of half or a quarter of its length. Shorter rows cost only
    the prompts, which run once with each split of their group; recomputing costs a third of an update. If parameters
    are split (fsdp), however, every microbatch gathers them, so rows are not shortened.

    The result is the same on all hosts. If free memory cannot be read, assume that there is not enough.

    Args:
      config: the config.
      model: the model's config.
      state_bytes: bytes of parameters, gradient and optimizer, on all devices together.
    """
    given, setting = config.training.token_budget, config.training.remat
    if setting != "auto":
        return Microbatch(given, setting)
    mesh = current_mesh()
    fsdp, tensor = (1, 1) if mesh is None else (mesh.shape["fsdp"], mesh.shape["tensor"])
    left = min(hosts.gather(free_memory())) - state_bytes / (fsdp * tensor)

    K, S, T = config.sampling.num_responses, config.sampling.max_prompt_tokens, config.sampling.max_tokens
    run = lambda budget: full_splits(K, S, T, budget) * S + K * T  # noqa: E731 - tokens of a group
    update, budget = most_update_tokens(config), given
    while kept_bytes(model, max(min(budget, update), S + T), config.model.dtype) > SHARE * left:
        budget //= 2
        if fsdp > 1 or budget < max(SHORTEST, S + T) or 3 * run(budget) > 4 * run(given):
            return Microbatch(given, remat=True)
    return Microbatch(budget, remat=False)


def most_update_tokens(config: Config) -> int:
    """Return the most tokens of an update, in RL or the warm start: each prompt once, everything at full length."""
    training, sampling, warm = config.training, config.sampling, config.warm_start
    S, T = sampling.max_prompt_tokens, sampling.max_tokens
    update = training.prompts_per_step // training.updates_per_step * (S + sampling.num_responses * T)
    return max(update, warm.batch_size * (S + T) if warm.steps else 0)


def kept_bytes(model: ModelConfig, tokens: int, dtype: DTypeLike) -> int:
    """Return the bytes of the activations saved for the backward pass, over all layers.

    These are the outputs of the matrix products, those of attention to the prompt and to the response itself, and the
    input of each layer.
    """
    sizes = axis_sizes(model)
    products = sum(
        math.prod(sizes[a] for a in p.outputs) for p in declared(model) if p.in_layers and p.kind == "matrix"
    )
    width = products + 2 * model.num_heads * model.head_width + model.width
    return model.num_layers * tokens * width * jnp.dtype(dtype).itemsize


def free_memory() -> int:
    """Return the free bytes of this process's first device, or of the machine if the device does not report them."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    table = Path("/proc/meminfo")
    if not table.exists():
        return 0
    lines = dict(line.split(":") for line in table.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
