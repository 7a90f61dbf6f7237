"""Prompts to verified rollouts: encoding, sampling and verification of groups, and the hooks of methods.

`environment.py` holds the task, the sampler and the verifiers; `rounds.py` samples the groups of a step and makes the
batch that the objective and the update take.
"""
