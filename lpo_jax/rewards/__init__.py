"""Verifiers: a response and its data row in, a verdict out; and the pool of processes that runs them.

Importing this imports neither jax nor any model code, so that a worker process starts in a moment.
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
