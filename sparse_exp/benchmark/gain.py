"""How much faster a deployed network is than a dense one, and what makes it so, as a chain of factors.

The chain begins with the dense network in floating point, in the fastest of the other engines, and ends with
what is deployed. Its links are another runtime, zeros, 8 bits and more cores; the factors multiply to the
whole gain.

Zeros and 8 bits can be added in either order: dense -> pruned -> both, or dense -> quantized -> both. Where
all four networks were measured, each of the two causes has two factors, and counts with their geometric mean.
So neither order is preferred.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_exp.benchmark.measurements import Row

RUNTIME, ZEROS, INT8, CORES = "runtime", "sparsity", "8 bits", "cores"
# Causes that cannot be told apart, as rows between them are missing.
ZEROS_AND_INT8 = "sparsity and 8 bits"
RUNTIME_AND_ZEROS = "runtime and sparsity"
ALL = "runtime, sparsity and 8 bits"
_CORES_IN_KEY = re.compile(r"_c\d+$")
_STREAMS_IN_KEY = re.compile(r"_(?:async|s)(\d+)")


@dataclass(frozen=True)
class Step:
    """One cause of a gain.

    Attributes:
        cause: ``runtime``, ``sparsity``, ``8 bits``, ``cores``, or several of them together.
        factor: how many times faster it makes the network; below 1 it makes it slower.
        measured: the rows that the factor comes from: ``deepsparse dense -> sparse_fp32 1.80``.
    """

    cause: str
    factor: float
    measured: tuple[str, ...]


@dataclass(frozen=True)
class Gain:
    """The gain under one load.

    Attributes:
        load: in words: ``sync, batch 1, 2 cores``.
        start: what the chain begins with: engine, variant, cores.
        end: what is deployed, likewise.
        total: how many times faster the end is than the start: the product of the factors.
        steps: the causes, in order.
        missing: rows that were not measured, and what is unknown without them.
        against_dense: gain over the fastest dense fp32 of all engines on as many cores; None: not measured.
        against_int8: gain over the fastest dense int8, likewise.
        cores: of the start and of the end.
    """

    load: str
    start: str
    end: str
    total: float
    steps: tuple[Step, ...]
    missing: tuple[str, ...]
    against_dense: float | None
    against_int8: float | None
    cores: tuple[int, int]


def first_network(rows: Sequence[Row]) -> list[Row]:
    """The rows of the same network as the first; those of other networks cannot be compared with it."""
    return [row for row in rows if row.get("network") == rows[0].get("network")]


def deployed_engine(rows: Iterable[Row]) -> str | None:
    """The engine that a run deploys to: the first that has a row of the variant ``sparse``."""
    return next((str(row["engine"]) for row in rows if row["variant"] == "sparse"), None)


def by_load(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows in groups of the same scenario, batch size and streams, on whatever number of cores."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = _CORES_IN_KEY.sub("", str(row.get("key", "")))
        groups.setdefault((row["scenario"], row["batch"], key), []).append(row)
    return list(groups.values())


def gain_of(rows: Sequence[Row], engine: str) -> Gain | None:
    """Take the gain under one load apart.

    Args:
        rows: of that load, as `by_load` groups them.
        engine: that is deployed to.

    Returns:
        None where what is deployed was not measured, or nothing that it can be compared with.
    """
    speeds = _Speeds(rows, engine)
    few, many = speeds.few, speeds.many
    end, last = speeds.own("sparse", few), speeds.own("sparse", many)
    other, baseline = speeds.fastest("dense", few, but=engine)
    own = speeds.own("dense", few)
    start = baseline or own
    if end is None or last is None or start is None:
        return None
    steps = list(_steps(speeds, other, baseline, own, end))
    if many > few:
        link = f"{engine} sparse on {few} -> {many} cores {last / end:.2f}"
        steps.append(Step(CORES, last / end, (link,)))
    dense, int8 = (speeds.fastest(variant, many)[1] for variant in ("dense", "dense_int8"))
    return Gain(
        load=_load_in_words(rows[0], many),
        start=f"{other if baseline else engine} dense, {_cores_in_words(few)}",
        end=f"{engine} sparse, {_cores_in_words(many)}",
        total=last / start,
        steps=tuple(steps),
        missing=tuple(_missing(speeds, baseline, own)),
        against_dense=last / dense if dense else None,
        against_int8=last / int8 if int8 else None,
        cores=(few, many),
    )


def headline(gain: Gain) -> str:
    """The gain and its causes in a sentence."""
    causes = " x ".join(f"{step.factor:.2f} ({step.cause})" for step in gain.steps)
    fair = [
        f"{value:.2f} times the fastest {what}"
        for value, what in ((gain.against_dense, "dense fp32"), (gain.against_int8, "dense int8"))
        if value is not None
    ]
    tail = f"; {' and '.join(fair)} of all engines" if fair else ""
    return f"{gain.end} is {gain.total:.2f} times as fast as {gain.start}: {causes}{tail}."


class _Speeds:
    """Images per second of the rows of one load, and the cores on which the deployed network was measured.

    Attributes:
        engine: that is deployed to.
        few: least number of cores; the chain begins there.
        many: largest number of cores; the chain ends there.
        quantized: what is deployed computes in int8, as far as its row says.
    """

    def __init__(self, rows: Sequence[Row], engine: str) -> None:
        self._rows, self.engine = rows, engine
        deployed = [row for row in rows if (row["engine"], row["variant"]) == (engine, "sparse")]
        self.few: int = min((row["cores"] for row in deployed), default=0)
        self.many: int = max((row["cores"] for row in deployed), default=0)
        self.quantized = bool(deployed) and deployed[0].get("precision") != "fp32"

    def own(self, variant: str, cores: int) -> float | None:
        """That of the deployed engine; None where it was not measured."""
        found = [speed for name, speed in self._of(variant, cores) if name == self.engine]
        return max(found, default=None)

    def fastest(self, variant: str, cores: int, but: str = "") -> tuple[str, float | None]:
        """The fastest engine except ``but``, and its speed; None where none was measured."""
        found = [(speed, name) for name, speed in self._of(variant, cores) if name != but]
        speed, name = max(found, default=(None, ""))
        return name, speed

    def _of(self, variant: str, cores: int) -> Iterator[tuple[str, float]]:
        for row in self._rows:
            if row["variant"] == variant and row["cores"] == cores:
                yield str(row["engine"]), float(row["items_per_s"])


def _steps(
    speeds: _Speeds, other: str, baseline: float | None, own: float | None, end: float
) -> Iterator[Step]:
    """From the dense network in another engine to what is deployed, on the fewest cores.

    Args:
        speeds: of the load.
        other: the fastest of the other engines with the dense network.
        baseline: its speed; None where no other engine was measured.
        own: speed of the dense network in the deployed engine; None where it was not measured.
        end: speed of what is deployed.
    """
    engine = speeds.engine
    if own is None:
        assert baseline is not None
        cause = ALL if speeds.quantized else RUNTIME_AND_ZEROS
        yield Step(cause, end / baseline, (f"{other} dense -> {engine} sparse {end / baseline:.2f}",))
        return
    if baseline is not None:
        yield Step(RUNTIME, own / baseline, (f"{other} dense -> {engine} dense {own / baseline:.2f}",))
    if speeds.quantized:
        yield from _zeros_and_int8(speeds, own, end)
    else:
        yield _mean_step(engine, ZEROS, [("dense", "sparse", end / own)])


def _zeros_and_int8(speeds: _Speeds, dense: float, end: float) -> Iterator[Step]:
    """The factors of zeros and of 8 bits, over whichever of the two ways between them were measured."""
    pruned, int8 = speeds.own("sparse_fp32", speeds.few), speeds.own("dense_int8", speeds.few)
    if pruned is None and int8 is None:
        yield _mean_step(speeds.engine, ZEROS_AND_INT8, [("dense", "sparse", end / dense)])
        return
    zeros, bits = [], []
    if pruned is not None:
        zeros.append(("dense", "sparse_fp32", pruned / dense))
        bits.append(("sparse_fp32", "sparse", end / pruned))
    if int8 is not None:
        bits.insert(0, ("dense", "dense_int8", int8 / dense))
        zeros.append(("dense_int8", "sparse", end / int8))
    yield _mean_step(speeds.engine, ZEROS, zeros)
    yield _mean_step(speeds.engine, INT8, bits)


def _mean_step(engine: str, cause: str, links: Sequence[tuple[str, str, float]]) -> Step:
    """The geometric mean of the factors that a cause has between two variants."""
    factor = math.prod(value for _, _, value in links) ** (1 / len(links))
    return Step(cause, factor, tuple(f"{engine} {start} -> {end} {value:.2f}" for start, end, value in links))


def _missing(speeds: _Speeds, baseline: float | None, own: float | None) -> Iterator[str]:
    if baseline is None:
        yield "dense in an engine other than the deployed one: without it the runtime's part is unknown"
    if own is None:
        yield f"{speeds.engine} dense: without it nothing can be told apart"
    elif speeds.quantized:
        absent = [name for name in ("sparse_fp32", "dense_int8") if speeds.own(name, speeds.few) is None]
        known = (
            "zeros and 8 bits cannot be told apart" if len(absent) == 2 else "one order of the two is known"
        )
        yield from (f"{speeds.engine} {name}: {known}" for name in absent)
    if speeds.fastest("dense_int8", speeds.many)[1] is None:
        yield "dense_int8 in any engine: the fairest thing to compare with"


def _load_in_words(row: Row, cores: int) -> str:
    asked = _STREAMS_IN_KEY.search(str(row.get("key", "")))
    streams = f", {asked[1]} streams" if asked else ""
    return f"{row['scenario']}, batch {row['batch']}{streams}, {_cores_in_words(cores)}"


def _cores_in_words(number: int) -> str:
    return f"{number} core{'s' if number > 1 else ''}"
