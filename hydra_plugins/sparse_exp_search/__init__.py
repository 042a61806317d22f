"""Hydra's ``hydra/sweeper=search``: Optuna proposes the jobs of a sweep (``sweep=pareto``).

Hydra imports this package at every start, but none of its modules whose names begin with an underscore. Only
these import Optuna.
"""
