"""Training: the step in three parts, the optimizer, supervised learning, and the loop around them.

`loop.py` reads from top to bottom as one training step; `learner.py` holds the updates, `step.py` their mathematics.
"""
