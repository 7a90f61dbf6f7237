"""The catalogue's rows, a file for each family. A row is a composition in a line or two."""
