"""The command line: one file per command, each with `add_parser` (its arguments) and `run` (its implementation).

`main` holds the table of commands and prints errors as one line; `parsers`, `devices` and `resumable` hold code that
several commands share. Heavy imports are inside `run`, so `lpo --help` stays fast.
"""
