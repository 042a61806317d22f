"""Why is it (not) faster? The gain of a benchmark taken apart, its slowest layers, what to try next.

The way from a dense network in floating point in the best of the other runtimes to what is deployed is a
chain of measured rows: another runtime, zeros, 8 bits, more cores. The factors of a chain multiply to the
whole. Zeros and 8 bits form a square, dense, pruned, quantized, both: where all four corners were measured,
each gets the geometric mean of its two edges, so that neither order is preferred.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparse_exp.benchmark.gain import Split, deployed_engine, headline, loads, measured_rows, split
from sparse_exp.benchmark.layers import Costs, Profiles, costs_of
from sparse_exp.benchmark.results import Row

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Why:
    """What can be said of a benchmark.

    Attributes:
        splits: of each load.
        costs: of the models that were profiled; the deployed one first.
        advice: what to try next, a sentence or two each, from what was measured.
    """

    splits: tuple[Split, ...]
    costs: tuple[Costs, ...]
    advice: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def explain(rows: Sequence[Row], profiles: Profiles | None = None) -> Why:
    """Take a benchmark apart.

    Args:
        rows: of ``benchmark.json``; see docs/benchmark.md. The first engine with a measured ``sparse`` row
            is the one that is deployed to. Rows of several networks are not mixed: the first counts.
        profiles: layers of some cells, by ``<engine>/<variant>``, as `profiles_of` has them.
    """
    from sparse_exp.benchmark.advice import advise

    measured = measured_rows(rows)
    engine = deployed_engine(measured)
    costs = tuple(costs_of(cell, profile) for cell, profile in (profiles or {}).items())
    if engine is None:
        return Why((), costs, ())
    found = [split(load, engine) for load in loads(measured)]
    splits = [one for one in found if one is not None]
    return Why(tuple(splits), costs, tuple(advise(measured, engine, splits, costs)))


def console_lines(why: Why) -> list[str]:
    """The same in a few lines: the gain of each load, and the first things to try."""
    gains = [f"{one.load}: {headline(one)}" for one in why.splits]
    return [*gains, *(f"Try next: {line}" for line in why.advice[:3])]
