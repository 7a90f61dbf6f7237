"""Verifiers, which map a response and its data row to a verdict, and the pool of worker processes that runs them.

Each verifier's file exports a descriptor; `registry.py` collects them. Programs written by a model run in a sandbox.
Importing this package imports neither JAX nor any model code, so that worker processes start quickly.
"""

from lpo_jax.rewards.descriptor import Verifier, VerifierDescriptor
from lpo_jax.rewards.pool import VerifierPool
from lpo_jax.rewards.registry import VerifierSpec, get, names
from lpo_jax.rewards.user_code import load_function
from lpo_jax.rewards.verdict import Verdict, as_verdict

__all__ = [
    "Verdict",
    "Verifier",
    "VerifierDescriptor",
    "VerifierPool",
    "VerifierSpec",
    "as_verdict",
    "get",
    "load_function",
    "names",
]
