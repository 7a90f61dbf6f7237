"""The command line: one file per command, with `add_arguments` and `run`; `resumable` has all that run a config.

`main` holds the table of commands and prints errors as one line; `parsers` and `devices` hold code that several
commands share. Heavy imports are inside `run`, so `lpo --help` stays fast.
"""
