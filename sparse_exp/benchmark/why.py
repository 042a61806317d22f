"""Why a deployed network is, or is not, faster: the gain taken apart, the slowest layers, what to try next.

`sparse_exp.benchmark.gain` splits the measured gain into factors, `sparse_exp.benchmark.layers` says which
layers take the time, and `sparse_exp.benchmark.advice` draws conclusions from both. `explain` puts them
together for ``why.json``, the console and, through `sparse_exp.report.why`, the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparse_exp.benchmark.advice import advise
from sparse_exp.benchmark.gain import ZEROS, Gain, by_load, deployed_row, first_network, gain_of, headline
from sparse_exp.benchmark.layers import Costs, Profiles, costs_of
from sparse_exp.benchmark.measurements import Row, measured
from sparse_exp.config.runtimes import skips_zeros


@dataclass(frozen=True)
class Why:
    """What a benchmark says about the speed of the deployed network.

    Attributes:
        gains: one for each load.
        zeros: what the zeros can gain in the engine that is deployed to, a sentence; empty: not known.
        costs: of the networks that were profiled, the deployed one first.
        advice: what to try next, one or two sentences each.
    """

    gains: tuple[Gain, ...]
    zeros: str
    costs: tuple[Costs, ...]
    advice: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for ``why.json``, which calls the gains ``splits``."""
        splits, costs = map(_plain, self.gains), map(asdict, self.costs)
        return {
            "splits": list(splits),
            "zeros": self.zeros,
            "costs": list(costs),
            "advice": list(self.advice),
        }


def explain(rows: Sequence[Row], profiles: Profiles | None = None, work: float | None = None) -> Why:
    """Take a benchmark apart.

    Args:
        rows: of ``benchmark.json``; see docs/benchmark.md. Of several networks the first counts.
        profiles: layer times, as `sparse_exp.benchmark.layers.profiles_of` returns them.
        work: share of the multiplications that meet a zero, 0..1; None: not known.
    """
    found = first_network(measured(rows))
    deployed = deployed_row(found)
    costs = tuple(costs_of(cell, profile) for cell, profile in (profiles or {}).items())
    if deployed is None:
        return Why((), "", costs, ())
    gains = [gain for load in by_load(found) if (gain := gain_of(load, deployed["engine"]))]
    zeros = _zeros(deployed["engine"], work, gains) if work else ""
    return Why(tuple(gains), zeros, costs, tuple(advise(found, deployed, gains, costs)))


def _zeros(engine: str, work: float, gains: Sequence[Gain]) -> str:
    """What zeros can gain at most, by the work that they save, and what they do."""
    meet = f"{work:.0%} of the multiplications meet a zero"
    if not skips_zeros(engine):
        return (
            f"{meet}, but {engine} computes them like all others: there zeros make the compressed file "
            "smaller, and what is gained comes from elsewhere. Channels that go for good are faster in every "
            "engine: recipe=slim_quant."
        )
    factor = next((step.factor for gain in gains for step in gain.steps if step.cause == ZEROS), None)
    measured = f"; measured: {factor} times" if factor else ""
    return f"{meet}: to skip all of them would make it {1 / (1 - work):.2f} times as fast{measured}."


def _plain(gain: Gain) -> dict[str, Any]:
    """A gain as plain data: a ratio as its value and its bounds."""
    ratios = {name: getattr(gain, name) for name in ("total", "against_dense", "against_int8")}
    steps = [{**asdict(step), "factor": step.factor.as_dict()} for step in gain.steps]
    return {**asdict(gain), **{name: one and one.as_dict() for name, one in ratios.items()}, "steps": steps}


def console_lines(why: Why) -> list[str]:
    """The gain under each load, what zeros can do, and the first things to try, a line each."""
    gains = [f"{gain.load}: {headline(gain)}" for gain in why.gains]
    return [*gains, *filter(None, [why.zeros]), *(f"Try next: {line}" for line in why.advice[:3])]
