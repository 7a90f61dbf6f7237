"""`lpo compare`: the same run under many methods, paired by seed, and what the difference is worth.

grid      rules x methods x seeds -> one config a cell, checked before any runs
pool      worker processes that take cells from the list
worker    what such a process runs
outcome   what a finished cell leaves for the table
pairs     differences of pass@k with intervals over seeds and problems
table     the numbers of the report, as JSON
figures   the curves, as PNG files
report    both in words
command   the order of all that
"""
