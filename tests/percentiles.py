"""The numbers of a benchmark that are there only where inferences were enough."""

from __future__ import annotations

from sparse_exp.benchmark import CERTAIN_NUMBERS, NUMBERS


def needs_many_inferences(name: str) -> bool:
    """Whether a metric is a percentile that a few inferences do not have."""
    return name.startswith("benchmark/") and name.rpartition("/")[2] in {*NUMBERS} - {*CERTAIN_NUMBERS}
