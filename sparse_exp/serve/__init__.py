"""The detector over HTTP: ``python -m sparse_exp.serve MODEL``."""
