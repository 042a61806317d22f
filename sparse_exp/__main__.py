"""``python -m sparse_exp``."""

from sparse_exp.cli import main

main()
