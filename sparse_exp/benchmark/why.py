"""Why is it (not) faster? The gain of a benchmark taken apart, its slowest layers, what to try next.

The way from a dense network in floating point in the best of the other runtimes to what is deployed is a
chain of measured rows: another runtime, zeros, 8 bits, more cores. The factors of a chain multiply to the
whole. Zeros and 8 bits form a square, dense, pruned, quantized, both: where all four corners were measured,
each gets the geometric mean of its two edges, so that neither order is preferred.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_exp.benchmark.cells import Cell
from sparse_exp.benchmark.results import Row
from sparse_exp.engines import IsolatedEngine
from sparse_exp.engines.profile import LayerTime, Profile
from sparse_exp.errors import SparseExpError
from sparse_exp.hardware import physical_cpus
from sparse_exp.host import default_lock_path, measuring_alone

_log = logging.getLogger(__name__)
Profiles = Mapping[str, Profile]

RUNTIME, ZEROS, INT8, BOTH, CORES = "runtime", "sparsity", "8 bits", "sparsity and 8 bits", "cores"
ALL = "runtime, sparsity and 8 bits"
_SLOWEST = 8
_OF_CORES = re.compile(r"_c\d+$")
# What a layer is, by the words of the engines; the first that fits.
_FAMILIES = {
    "sparse convolution": r"sparse convolution",
    "layout changes": r"shuffle|reorder|transpose|permute|layout|reformat",
    "several layers, tile by tile": r"tile by tile",
    "dense convolution": r"conv|winograd",
    "quantization": r"quanti[sz]e",
    "pooling and resizing": r"pool|resize|upsample|interpolate",
    "element by element": r"mul|add|div|sigmoid|silu|swish|gelu|eltwise|elementwise|batchnorm|subgraph",
    "other": r"",
}
# Of a detector's last module all but its convolutions: from raw outputs to boxes and scores.
_DECODING = re.compile(r"model\.24/(?!m\.\d)")
_OUTPUT = re.compile(r"_output_\d+.*$|_quant$")
_CONVOLUTION = re.compile(r"Conv|BatchNorm")


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


@dataclass(frozen=True)
class Layer:
    """One of the slowest layers: its name, what it is, and its share of the time, 0..1."""

    name: str
    kind: str
    ms: float
    share: float


@dataclass(frozen=True)
class Costs:
    """Where the time of one model in one engine goes.

    Attributes:
        cell: engine and variant.
        ms: of one inference of a batch, summed over the layers; more than without a profiler.
        kinds: share of the time by kind of layer, largest first.
        layers: the slowest.
        supported: share of the operators that the engine has code of its own for, 0..1; None: unknown.
        note: how it was measured.
    """

    cell: str
    ms: float
    kinds: dict[str, float]
    layers: tuple[Layer, ...]
    supported: float | None
    note: str


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
    splits = [split for load in _loads(measured) if (split := _split(load, engine))]
    return Why(tuple(splits), costs, tuple(advise(measured, engine, splits, costs)))


def measured_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows with numbers, of the first network."""
    found = [row for row in rows if row.get("items_per_s")]
    return [row for row in found if row.get("network") == found[0].get("network")]


def deployed_engine(rows: Iterable[Row]) -> str | None:
    """The engine that is deployed to: the first one that runs the variant ``sparse``."""
    return next((str(row["engine"]) for row in rows if row["variant"] == "sparse"), None)


def _loads(rows: Iterable[Row]) -> list[list[Row]]:
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


def _split(rows: Sequence[Row], engine: str) -> Split | None:
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


def profiles_of(
    cells: Sequence[Cell], rows: Sequence[Row], images: np.ndarray, *, lock_path: Path | None = None
) -> dict[str, Profile]:
    """Time the layers of what is deployed, and of the dense network in the same engine, alone on the host.

    Under the settings that were tuned for the first load, in one stream.

    Args:
        cells: what was measured.
        rows: the measurements.
        images: uint8 (N, 3, H, W), at least a batch of them.
        lock_path: file of the host-wide lock; None: `default_lock_path`.

    Returns:
        Profiles by ``<engine>/<variant>``; without those that the engine cannot take.
    """
    measured = measured_rows(rows)
    engine = deployed_engine(measured)
    found: dict[str, Profile] = {}
    with measuring_alone(lock_path or default_lock_path()):
        for variant in ("sparse", "dense"):
            row = next((r for r in measured if (r["engine"], r["variant"]) == (engine, variant)), None)
            cell = next((each for each in cells if row and _is_of(each, row)), None)
            if cell is None or row is None:
                continue
            try:
                found[f"{engine}/{variant}"] = _profile(cell, row, images)
            except SparseExpError as error:
                _log.warning("The layers of %s/%s could not be timed: %s", engine, variant, error)
    return found


def _is_of(cell: Cell, row: Row) -> bool:
    same = (cell.engine, cell.variant, cell.load.key) == (row["engine"], row["variant"], row["key"])
    return same and (row.get("network") or "") == cell.network and cell.model is not None


def _profile(cell: Cell, row: Row, images: np.ndarray) -> Profile:
    assert cell.model is not None
    cores, batch = cell.load.cores, cell.load.batch_size
    with closing(IsolatedEngine(cell.engine)) as engine:
        engine.load(
            cell.model,
            batch_size=batch,
            cores=cores,
            options=row.get("options", {}),
            pin=physical_cpus()[:cores] if row.get("pinning", True) else None,
        )
        return engine.profile(images[:batch])


def costs_of(cell: str, profile: Profile) -> Costs:
    """Sum a profile up.

    Args:
        cell: engine and variant.
        profile: its layers.
    """
    total = sum(layer.ms for layer in profile.layers)
    kinds: dict[str, float] = {}
    for layer in profile.layers:
        kinds[family(layer)] = kinds.get(family(layer), 0.0) + layer.ms / (total or 1.0)
    slowest = sorted(profile.layers, key=lambda layer: layer.ms, reverse=True)[:_SLOWEST]
    return Costs(
        cell=cell,
        ms=total,
        kinds=dict(sorted(kinds.items(), key=lambda item: -item[1])),
        layers=tuple(Layer(one.name, family(one), one.ms, one.ms / (total or 1.0)) for one in slowest),
        supported=profile.supported,
        note=profile.note,
    )


def family(layer: LayerTime) -> str:
    """What a layer is, in the same words for all engines.

    >>> family(LayerTime("/model.24/Sigmoid", "Sigmoid", 1.0))
    'decoding'
    """
    if _DECODING.search(layer.name):
        return "decoding"
    kind = layer.kind.lower()
    return next(name for name, pattern in _FAMILIES.items() if re.search(pattern, kind))


def to_markdown(why: Why) -> str:
    """The body of the section "Why is it (not) faster?" of a report; empty where there is nothing to say."""
    parts = [_split_markdown(split) for split in why.splits]
    parts += [_kinds_markdown(why.costs), *(_layers_markdown(costs) for costs in why.costs[:1])]
    if why.advice:
        parts.append("**What to try next**\n\n" + "\n".join(f"- {line}" for line in why.advice))
    return "\n\n".join(part for part in parts if part)


def _split_markdown(split: Split) -> str:
    from sparse_exp.report.markdown import markdown_table

    rows = [(step.cause, f"{step.factor:.2f}", "; ".join(step.measured)) for step in split.steps]
    rows.append(("all together", f"{split.total:.2f}", f"{split.start} -> {split.end}"))
    table = markdown_table(("cause", "times faster", "measured"), rows)
    missing = "\n".join(f"- Not measured: {line}." for line in split.missing)
    return f"**{split.load}**: {headline(split)}\n\n{table}\n\n{missing}".rstrip()


def _kinds_markdown(all_costs: Sequence[Costs]) -> str:
    """Milliseconds and shares by kind of layer, of the profiled models beside each other."""
    from sparse_exp.report.markdown import markdown_table

    if not all_costs:
        return ""
    kinds = dict.fromkeys(kind for costs in all_costs for kind in costs.kinds)
    rows = [(kind, *(_part(costs, kind) for costs in all_costs)) for kind in kinds]
    totals = ("all together", *(f"{costs.ms:.1f}" for costs in all_costs))
    table = markdown_table(("ms by kind of layer", *(costs.cell for costs in all_costs)), [*rows, totals])
    return f"**Where the time goes** ({all_costs[0].note}; profiling takes time itself)\n\n{table}"


def _part(costs: Costs, kind: str) -> str:
    share = costs.kinds.get(kind, 0.0)
    return f"{costs.ms * share:.1f} ({share:.0%})"


def _layers_markdown(costs: Costs) -> str:
    from sparse_exp.report.markdown import markdown_table

    rows = [(short(one.name), one.kind, f"{one.ms:.2f}", f"{one.share:.0%}") for one in costs.layers]
    known = costs.supported
    supported = "" if known is None else f": {known:.0%} of its operators run in the engine's own code"
    table = markdown_table(("layer", "kind", "ms", "share"), rows)
    return f"**The slowest layers of {costs.cell}**{supported}\n\n{table}"


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


def console_lines(why: Why) -> list[str]:
    """The same in a few lines: the gain of each load, and the first things to try."""
    gains = [f"{split.load}: {headline(split)}" for split in why.splits]
    return [*gains, *(f"Try next: {line}" for line in why.advice[:3])]


def short(name: str) -> str:
    """A layer as ``sparsity.csv`` names it, or the first of several and how many there are more.

    >>> short("/model/model.6/m/m.0/cv2/conv/module/bn/BatchNormalization_output_0_quant,/model/model.7/Mul")
    'model.6.m.0.cv2.conv and 1 more'
    """
    first, *more = name.split(",")
    parts = [part for part in _OUTPUT.sub("", first).split("/") if part not in ("", "module", "bn")]
    if len(parts) > 1 and _CONVOLUTION.match(parts[-1]):
        parts.pop()
    kept = [
        part for part, after in zip(parts, [*parts[1:], ""], strict=True) if not after.startswith(f"{part}.")
    ]
    shown = ".".join(kept)
    return f"{shown} and {len(more)} more" if more else shown
