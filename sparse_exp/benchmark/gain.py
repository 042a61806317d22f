"""The gain over a dense network as a chain of factors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_exp.benchmark.results import Row

RUNTIME, ZEROS, INT8, BOTH, CORES = "runtime", "sparsity", "8 bits", "sparsity and 8 bits", "cores"


ALL = "runtime, sparsity and 8 bits"


_OF_CORES = re.compile(r"_c\d+$")


@dataclass(frozen=True)
class Step:
    """One cause of the gain.

    Attributes:
        cause: ``runtime``, ``sparsity``, ``8 bits``, ``cores``, or several of them together.
        factor: how many times faster it makes; below 1 slower.
        measured: the rows that it comes from: ``deepsparse dense -> sparse_fp32 1.80``.
    """

    cause: str
    factor: float
    measured: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """The gain under one load, taken apart.

    Attributes:
        load: in words: ``sync, batch 1, 2 cores``.
        start: what it is compared with: engine, variant, cores.
        end: what is deployed, likewise.
        total: how many times faster the end is: the product of the factors.
        steps: the causes, in order.
        missing: rows without which the split is coarser, or the comparison less fair.
        against_dense: gain over the fastest dense fp32 of all engines on as many cores; None: not measured.
        against_int8: gain over the fastest dense int8, likewise.
        cores: on which the chain starts and ends.
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


def measured_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows with numbers, of the first network."""
    found = [row for row in rows if row.get("items_per_s")]
    return [row for row in found if row.get("network") == found[0].get("network")]


def deployed_engine(rows: Iterable[Row]) -> str | None:
    """The engine that is deployed to: the first one that runs the variant ``sparse``."""
    return next((str(row["engine"]) for row in rows if row["variant"] == "sparse"), None)


def loads(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that were asked for the same, on whatever cores."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = _OF_CORES.sub("", str(row.get("key", "")))
        groups.setdefault((row["scenario"], row["batch"], key), []).append(row)
    return list(groups.values())


class _Speeds:
    """Items per second of the rows of one load."""

    def __init__(self, rows: Sequence[Row], engine: str) -> None:
        self.rows, self.engine = rows, engine
        ends = [row["cores"] for row in rows if (row["engine"], row["variant"]) == (engine, "sparse")]
        self.few: int = min(ends, default=0)
        self.many: int = max(ends, default=0)

    def of(self, variant: str, cores: int) -> float | None:
        """Of the deployed engine."""
        return self.best(variant, cores, lambda engine: engine == self.engine)[1]

    def best(self, variant: str, cores: int, allowed: Any = lambda _: True) -> tuple[str, float | None]:
        """The fastest engine, and its speed."""
        found = [
            (float(row["items_per_s"]), str(row["engine"]))
            for row in self.rows
            if row["variant"] == variant and row["cores"] == cores and allowed(row["engine"])
        ]
        speed, engine = max(found, default=(None, ""))
        return engine, speed

    @property
    def quantized(self) -> bool:
        """Whether what is deployed computes in int8, as far as the row says."""
        row = next(r for r in self.rows if (r["engine"], r["variant"]) == (self.engine, "sparse"))
        return row.get("precision") != "fp32"


def split(rows: Sequence[Row], engine: str) -> Split | None:
    """The chain of one load; None where its end or any start was not measured."""
    speeds = _Speeds(rows, engine)
    end, last = speeds.of("sparse", speeds.few), speeds.of("sparse", speeds.many)
    other, baseline = speeds.best("dense", speeds.few, lambda name: name != engine)
    own = speeds.of("dense", speeds.few)
    start = baseline or own
    if end is None or last is None or start is None:
        return None
    steps = list(_steps(speeds, (other, baseline), own, end))
    if speeds.many > speeds.few:
        said = f"{engine} sparse on {speeds.few} -> {speeds.many} cores {last / end:.2f}"
        steps.append(Step(CORES, last / end, (said,)))
    return Split(
        load=_load(rows[0], speeds),
        start=f"{other if baseline else engine} dense, {_cores(speeds.few)}",
        end=f"{engine} sparse, {_cores(speeds.many)}",
        total=last / start,
        steps=tuple(steps),
        missing=tuple(_missing(speeds, baseline, own)),
        against_dense=_over(last, speeds.best("dense", speeds.many)[1]),
        against_int8=_over(last, speeds.best("dense_int8", speeds.many)[1]),
        cores=(speeds.few, speeds.many),
    )


def _steps(speeds: _Speeds, other: tuple[str, float | None], own: float | None, end: float) -> Iterator[Step]:
    """From the dense network in another runtime to what is deployed, on the fewest cores."""
    name, baseline = other
    if own is None:
        assert baseline is not None
        said = f"{name} dense -> {speeds.engine} sparse {end / baseline:.2f}"
        yield Step(ALL if speeds.quantized else "runtime and sparsity", end / baseline, (said,))
        return
    if baseline is not None:
        said = f"{name} dense -> {speeds.engine} dense {own / baseline:.2f}"
        yield Step(RUNTIME, own / baseline, (said,))
    pruned = speeds.of("sparse_fp32", speeds.few) if speeds.quantized else None
    int8 = speeds.of("dense_int8", speeds.few) if speeds.quantized else None
    yield from _square(speeds, own, pruned, int8, end)


def _square(
    speeds: _Speeds, dense: float, pruned: float | None, int8: float | None, end: float
) -> Iterator[Step]:
    """Zeros and 8 bits, over the corners of the square that were measured."""
    if not speeds.quantized:
        yield _step(speeds.engine, ZEROS, [("dense", "sparse", end / dense)])
        return
    if pruned is None and int8 is None:
        yield _step(speeds.engine, BOTH, [("dense", "sparse", end / dense)])
        return
    zeros, bits = [], []
    if pruned is not None:
        zeros.append(("dense", "sparse_fp32", pruned / dense))
        bits.append(("sparse_fp32", "sparse", end / pruned))
    if int8 is not None:
        bits.insert(0, ("dense", "dense_int8", int8 / dense))
        zeros.append(("dense_int8", "sparse", end / int8))
    yield _step(speeds.engine, ZEROS, zeros)
    yield _step(speeds.engine, INT8, bits)


def _step(engine: str, cause: str, edges: Sequence[tuple[str, str, float]]) -> Step:
    factor = math.prod(edge[2] for edge in edges) ** (1 / len(edges))
    return Step(cause, factor, tuple(f"{engine} {start} -> {end} {value:.2f}" for start, end, value in edges))


def _missing(speeds: _Speeds, baseline: float | None, own: float | None) -> Iterator[str]:
    if baseline is None:
        yield "dense in an engine other than the deployed one: without it the runtime's part is unknown"
    if own is None:
        yield f"{speeds.engine} dense: without it nothing can be told apart"
    elif speeds.quantized:
        absent = [name for name in ("sparse_fp32", "dense_int8") if speeds.of(name, speeds.few) is None]
        tail = (
            "zeros and 8 bits cannot be told apart" if len(absent) == 2 else "one order of the two is known"
        )
        yield from (f"{speeds.engine} {name}: {tail}" for name in absent)
    if speeds.best("dense_int8", speeds.many)[1] is None:
        yield "dense_int8 in any engine: the fairest thing to compare with"


def _load(row: Row, speeds: _Speeds) -> str:
    asked = re.search(r"_(?:async|s)(\d+)", str(row.get("key", "")))
    streams = f", {asked[1]} streams" if asked else ""
    return f"{row['scenario']}, batch {row['batch']}{streams}, {_cores(speeds.many)}"


def _cores(number: int) -> str:
    return f"{number} core{'s' if number > 1 else ''}"


def _over(speed: float, other: float | None) -> float | None:
    return speed / other if other else None


def headline(split: Split) -> str:
    """The gain and its causes in a sentence."""
    causes = " x ".join(f"{step.factor:.2f} ({step.cause})" for step in split.steps)
    fair = [
        f"{value:.2f} times the fastest {what}"
        for value, what in ((split.against_dense, "dense fp32"), (split.against_int8, "dense int8"))
        if value is not None
    ]
    tail = f"; {' and '.join(fair)} of all engines" if fair else ""
    return f"{split.end} is {split.total:.2f} times as fast as {split.start}: {causes}{tail}."
