"""How much faster a deployed network is than a dense one, and what makes it so, as a chain of factors.

The chain begins with the dense network in floating point, in the fastest of the other engines, and ends with
what is deployed. Its links are another runtime, zeros, 8 bits and more cores; the factors multiply to the
whole gain.

Zeros and 8 bits can be added in either order: dense -> pruned -> both, or dense -> quantized -> both. Where
all four networks were measured, each of the two causes has two factors, and counts with their geometric mean.
So neither order is preferred. An engine that computes zeros like other numbers has no factor of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_exp.benchmark.measurements import Row, fastest
from sparse_exp.benchmark.ratios import Ratio, mean_ratio, ratio_of_rows, speeds_of
from sparse_exp.config.runtimes import may_be_shipped, skips_zeros

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
    factor: Ratio
    measured: tuple[str, ...]


@dataclass(frozen=True)
class Gain:
    """The gain under one load.

    Attributes:
        load: in words: ``sync, batch 1, 2 cores``.
        start: what the chain begins with: engine, variant, cores.
        end: what is deployed, likewise.
        total: how many times faster the end is than the start. The factors multiply to it, as far as their
            rows were measured in the same turns.
        steps: the causes, in order.
        missing: rows that were not measured, and what is unknown without them.
        against_dense: gain over the fastest dense fp32 of all engines on as many cores; None: not measured.
        against_int8: gain over the fastest dense int8, likewise.
        cores: of the start and of the end.
    """

    load: str
    start: str
    end: str
    total: Ratio
    steps: tuple[Step, ...]
    missing: tuple[str, ...]
    against_dense: Ratio | None
    against_int8: Ratio | None
    cores: tuple[int, int]


def first_network(rows: Sequence[Row]) -> list[Row]:
    """The rows of the same network as the first; those of other networks cannot be compared with it."""
    return [row for row in rows if row.get("network") == rows[0].get("network")]


def deployed_row(rows: Iterable[Row]) -> Row | None:
    """What to ship: the row of the variant ``sparse`` in the fastest engine that may be shipped.

    Args:
        rows: with numbers, of one network; the first load of that variant counts.

    Returns:
        The fastest of all engines where none of them may be shipped; None where nothing was deployed.
    """
    sparse = [row for row in rows if row["variant"] == "sparse"]
    same = [row for row in sparse if load_of(row) == load_of(sparse[0])]
    return fastest(row for row in same if may_be_shipped(row["engine"])) or fastest(same)


def load_of(row: Row) -> tuple[Any, ...]:
    """What rows have in common that were measured under the same load."""
    return row.get("scenario", "sync"), row["batch"], row["cores"], row.get("key")


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
    baseline = speeds.fastest("dense", few, but=engine)
    own = speeds.own("dense", few)
    start = baseline or own
    if end is None or last is None or start is None:
        return None
    steps = list(_steps(speeds, baseline, own, end))
    if many > few:
        factor = ratio_of_rows(last, end)
        steps.append(Step(CORES, factor, (f"{engine} sparse on {few} -> {many} cores {factor}",)))
    dense, int8 = (speeds.fastest(variant, many) for variant in ("dense", "dense_int8"))
    return Gain(
        load=_load_in_words(rows[0], many),
        start=f"{start['engine']} dense, {_cores_in_words(few)}",
        end=f"{engine} sparse, {_cores_in_words(many)}",
        total=ratio_of_rows(last, start),
        steps=tuple(steps),
        missing=tuple(_missing(speeds, baseline, own)),
        against_dense=ratio_of_rows(last, dense) if dense else None,
        against_int8=ratio_of_rows(last, int8) if int8 else None,
        cores=(few, many),
    )


def headline(gain: Gain) -> str:
    """The gain and its causes in a sentence; a factor that cannot be told from 1 stands after a tilde."""
    causes = " x ".join(f"{step.factor} ({step.cause})" for step in gain.steps)
    fair = [
        f"{value} times the fastest {what}"
        for value, what in ((gain.against_dense, "dense fp32"), (gain.against_int8, "dense int8"))
        if value is not None
    ]
    tail = f"; {' and '.join(fair)} of all engines" if fair else ""
    if gain.total.is_noise:
        return f"{gain.end} is within noise of {gain.start} ({gain.total.value:.2f}): {causes}{tail}."
    return f"{gain.end} is {gain.total} times as fast as {gain.start}: {causes}{tail}."


class _Speeds:
    """The rows of one load, and the cores on which the deployed network was measured.

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

    def own(self, variant: str, cores: int) -> Row | None:
        """The fastest row of the deployed engine; None where there is none."""
        return fastest(row for row in self._of(variant, cores) if row["engine"] == self.engine)

    def fastest(self, variant: str, cores: int, but: str = "") -> Row | None:
        """The fastest row of all engines except ``but``; None where there is none."""
        return fastest(row for row in self._of(variant, cores) if row["engine"] != but)

    def _of(self, variant: str, cores: int) -> Iterator[Row]:
        return (row for row in self._rows if row["variant"] == variant and row["cores"] == cores)


def _steps(speeds: _Speeds, baseline: Row | None, own: Row | None, end: Row) -> Iterator[Step]:
    """From the dense network in another engine to what is deployed, on the fewest cores.

    Args:
        speeds: of the load.
        baseline: the dense network in the fastest of the other engines; None where none was measured.
        own: the dense network in the deployed engine; None where it was not measured.
        end: what is deployed.
    """
    if own is None:
        assert baseline is not None
        cause = ALL if speeds.quantized else RUNTIME_AND_ZEROS
        yield _mean_step(cause, [(baseline, end)])
        return
    if baseline is not None:
        yield _mean_step(RUNTIME, [(baseline, own)])
    if speeds.quantized and not skips_zeros(speeds.engine):
        yield _mean_step(INT8, [(own, end)])
    elif speeds.quantized:
        yield from _zeros_and_int8(speeds, own, end)
    else:
        yield _mean_step(ZEROS, [(own, end)])


def _zeros_and_int8(speeds: _Speeds, dense: Row, end: Row) -> Iterator[Step]:
    """The factors of zeros and of 8 bits, over whichever of the two ways between them were measured."""
    pruned, int8 = speeds.own("sparse_fp32", speeds.few), speeds.own("dense_int8", speeds.few)
    if pruned is None and int8 is None:
        yield _mean_step(ZEROS_AND_INT8, [(dense, end)])
        return
    zeros, bits = [], []
    if pruned is not None:
        zeros.append((dense, pruned))
        bits.append((pruned, end))
    if int8 is not None:
        bits.insert(0, (dense, int8))
        zeros.append((int8, end))
    yield _mean_step(ZEROS, zeros)
    yield _mean_step(INT8, bits)


def _mean_step(cause: str, links: Sequence[tuple[Row, Row]]) -> Step:
    """The geometric mean of the factors that a cause has between rows."""
    factor = mean_ratio([(speeds_of(end), speeds_of(start)) for start, end in links])
    return Step(cause, factor, tuple(_in_words(start, end) for start, end in links))


def _in_words(start: Row, end: Row) -> str:
    engine = "" if end["engine"] == start["engine"] else f"{end['engine']} "
    return f"{start['engine']} {start['variant']} -> {engine}{end['variant']} {ratio_of_rows(end, start)}"


def _missing(speeds: _Speeds, baseline: Row | None, own: Row | None) -> Iterator[str]:
    if baseline is None:
        yield "dense in an engine other than the deployed one: without it the runtime's part is unknown"
    if own is None:
        yield f"{speeds.engine} dense: without it nothing can be told apart"
    elif speeds.quantized and skips_zeros(speeds.engine):
        absent = [name for name in ("sparse_fp32", "dense_int8") if speeds.own(name, speeds.few) is None]
        known = (
            "zeros and 8 bits cannot be told apart" if len(absent) == 2 else "one order of the two is known"
        )
        yield from (f"{speeds.engine} {name}: {known}" for name in absent)
    if speeds.fastest("dense_int8", speeds.many) is None:
        yield "dense_int8 in any engine: the fairest thing to compare with"


def _load_in_words(row: Row, cores: int) -> str:
    asked = _STREAMS_IN_KEY.search(str(row.get("key", "")))
    streams = f", {asked[1]} streams" if asked else ""
    return f"{row['scenario']}, batch {row['batch']}{streams}, {_cores_in_words(cores)}"


def _cores_in_words(number: int) -> str:
    return f"{number} core{'s' if number > 1 else ''}"
