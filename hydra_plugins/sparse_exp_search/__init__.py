"""Hydra's ``hydra/sweeper=search``: Optuna looks for the jobs of a sweep (``sweep=pareto``).

Hydra imports this package at every start, but not its modules that begin with an underscore: only they
know Optuna.
"""
