"""How much of an update runs at once, and whether what its backward pass needs of each layer is kept or computed again,
by the memory at hand.

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

# Of the memory that parameters, gradient and optimizer leave; the rest is for logits, attention and the sampler.
SHARE = 0.5
# Tokens of a row that was made shorter, at least: each row reads all weights and adds to the whole gradient.
SHORTEST = 2048


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """What `training.token_budget` and `training.remat` come to.

    Attributes:
      token_budget: most tokens in a row.
      remat: whether the backward pass computes layers again.
    """

    token_budget: int
    remat: bool


def fit_microbatch(config: Config, model: ModelConfig, state_bytes: int) -> Microbatch:
    """What is asked for; with `training.remat: auto`, what is kept where that may fit.

    Where it does not fit at the budget, it may in rows half as long, or half of that: they cost no more than the
    prompts that run once more with each piece of their group, and recomputing costs a third. But where parameters are
    split (fsdp), every microbatch has to gather them: there rows stay as long as they may be.

    The same on all hosts. What a machine does not tell of its memory is taken for too little.

    Args:
      state_bytes: of parameters, gradient and optimizer, on all devices together.
    """
    asked, setting = config.training.token_budget, config.training.remat
    if setting != "auto":
        return Microbatch(asked, setting)
    mesh = current_mesh()
    fsdp, tensor = (1, 1) if mesh is None else (mesh.shape["fsdp"], mesh.shape["tensor"])
    left = min(hosts.gather(free_memory())) - state_bytes / (fsdp * tensor)

    K, S, T = config.sampling.num_responses, config.sampling.max_prompt_tokens, config.sampling.max_tokens
    run = lambda budget: full_splits(K, S, T, budget) * S + K * T  # noqa: E731 - tokens of a group
    update, budget = most_update_tokens(config), asked
    while kept_bytes(model, max(min(budget, update), S + T), config.model.dtype) > SHARE * left:
        budget //= 2
        if fsdp > 1 or budget < max(SHORTEST, S + T) or 3 * run(budget) > 4 * run(asked):
            return Microbatch(asked, remat=True)
    return Microbatch(budget, remat=False)


def most_update_tokens(config: Config) -> int:
    """Tokens of a run's largest update, of RL or of its warm start: every prompt once, everything at full length."""
    training, sampling, warm = config.training, config.sampling, config.warm_start
    S, T = sampling.max_prompt_tokens, sampling.max_tokens
    update = training.prompts_per_step // training.updates_per_step * (S + sampling.num_responses * T)
    return max(update, warm.batch_size * (S + T) if warm.steps else 0)


def kept_bytes(model: ModelConfig, tokens: int, dtype: Any) -> int:
    """Of the products' and attention's outputs (to the prompt and to the response itself), and of what enters a layer,
    for all layers."""
    sizes = axis_sizes(model)
    products = sum(math.prod(sizes[a] for a in p.outputs) for p in declared(model) if p.kind == "matrix")
    width = products + 2 * model.num_heads * model.head_width + model.width
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
