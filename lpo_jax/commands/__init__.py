"""The command line: one file a command, each with `add_parser` (its arguments) and `run` (its work).

`main` has the table of commands and turns errors into one line; `parsers`, `devices` and `resumable` hold what
several commands share. Heavy imports are made in `run`, so that `lpo --help` stays fast.
"""
