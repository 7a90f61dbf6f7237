"""What a run left on disk, shown to a reader: in the terminal, as one HTML file, and from a small local server.

`load` reads a run directory as far as it goes and names what is missing. `select` picks responses, `terminal` prints
them, `page` writes the report, `diff` compares two runs and `server` follows a run that is still going.

`import lpo_jax.inspection` does not import jax.
"""
