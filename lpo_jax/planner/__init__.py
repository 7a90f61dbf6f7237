"""`lpo plan`: predicts memory and time of a training step on TPU slices and GPUs that need not be present.

Programs are compiled ahead of time for the target (`programs`), read (`hlo`, `cost`, `collectives`) and compared with
estimates by arithmetic (`roofline`), by which better settings are searched (`plan`).
"""
