"""`lpo compare`: one run per rule, method and seed, and paired differences between the methods with intervals.

grid      rules x methods x seeds -> one config per cell, all checked before the first run
pool      worker processes that run the cells
worker    the program of a worker process
table     the results of finished cells, paired differences with intervals, and the numbers of the report, as JSON
figures   curves and differences, as PNG files
report    table and figures as a Markdown report
command   the command itself
"""
