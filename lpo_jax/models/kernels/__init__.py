"""Pallas kernels for TPUs. Each has a plain twin in `lpo_jax.models.attention`, which chooses between the two."""
