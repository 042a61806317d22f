"""Throughput and latency of exported models, measured so that the numbers can be compared.

`cells` says what is measured, `tuning` under which settings, `rounds` how, `host_state` what else happened
meanwhile, and `results` what comes of it. Nothing here needs more than numpy, psutil and the engines.
"""

from __future__ import annotations

from sparse_exp.benchmark.cells import Cell, Load, cells_of, loads_of
from sparse_exp.benchmark.measurements import NUMBERS, Measurement, Row, write_rows
from sparse_exp.benchmark.rounds import benchmark

__all__ = ["NUMBERS", "Cell", "Load", "Measurement", "Row", "benchmark", "cells_of", "loads_of", "write_rows"]
