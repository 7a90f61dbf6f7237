"""Verifiers, which map a response and its data row to a verdict, and the pool of worker processes that runs them.

Each verifier's file exports a descriptor; `registry.py` collects them. Programs written by a model run in a sandbox.
Importing this package imports neither JAX nor any model code, so that worker processes start quickly.
"""

from lpo_jax.rewards.pool import VerifierPool as VerifierPool
from lpo_jax.rewards.registry import VerifierSpec as VerifierSpec
from lpo_jax.rewards.registry import get as get
from lpo_jax.rewards.registry import names as names
from lpo_jax.rewards.user_code import load_function as load_function
from lpo_jax.rewards.verdict import Verdict as Verdict
from lpo_jax.rewards.verdict import Verifier as Verifier
from lpo_jax.rewards.verdict import VerifierDescriptor as VerifierDescriptor
from lpo_jax.rewards.verdict import as_verdict as as_verdict
