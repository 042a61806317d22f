"""Throughput and latency of exported models, measured so that the numbers can be compared.

The files in the order of a measurement: `cells` lists what is measured, `tuning` finds the settings of each
engine, `rounds` measures, `host_state` records what else happened on the host, `measurements` holds the
numbers and writes them, `speed_table` lays them out. `gain`, `layers`, `advice` and `why` then explain them.
Nothing here needs more than numpy, psutil and the engines.
"""

from __future__ import annotations

from sparse_exp.benchmark.cells import Cell, Load, cells_of, loads_of
from sparse_exp.benchmark.measurements import CERTAIN_NUMBERS, NUMBERS, Measurement, Row, write_rows
from sparse_exp.benchmark.rounds import benchmark

__all__ = [
    "CERTAIN_NUMBERS",
    "NUMBERS",
    "Cell",
    "Load",
    "Measurement",
    "Row",
    "benchmark",
    "cells_of",
    "loads_of",
    "write_rows",
]
