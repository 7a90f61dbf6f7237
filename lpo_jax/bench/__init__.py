"""`lpo bench`: the speed of sampling, the gradient and a whole step, compared with this machine's peak rates.

`measure` has the benchmarks and measures the peak rates, and `work` has the shapes of a batch and counts the FLOPs and
bytes that it needs.
"""
