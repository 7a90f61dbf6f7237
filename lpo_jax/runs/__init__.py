"""What a run leaves on disk, and how it continues from there.

The run directory with its settings and lock, the train state and position, checkpoints with checksums, the recorder of
metrics and responses, and the signals that stop a run.
"""
