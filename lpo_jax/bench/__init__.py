"""`lpo bench`: the speed of sampling, the gradient and a whole step, compared with this machine's peak rates.

`measure` has the benchmarks, `machine` measures the peak rates, `shapes` describes a batch, and `work` counts the FLOPs
and bytes that the batch needs.
"""
