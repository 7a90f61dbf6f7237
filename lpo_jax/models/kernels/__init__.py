"""Attention kernels for TPUs and NVIDIA GPUs. Each has a plain twin in `lpo_jax.models.attention`; see `choice`."""
