"""The rows of the catalogue, one file per family: each names a composition of parts and its source.

A row states the formula, the paper, the fidelity grade and what is uncertain. `catalogue.py` collects the rows.
"""
