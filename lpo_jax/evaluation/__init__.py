"""Held-out evaluation: sample responses to problems, verify them, and estimate pass@k and maj@k with intervals.

`heldout` evaluates a model during training; `suite` evaluates it on the benchmarks of `lpo eval --suite`.
"""
