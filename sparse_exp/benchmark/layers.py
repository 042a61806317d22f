"""Which layers of an engine take the time."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_exp.benchmark.cells import Cell
from sparse_exp.benchmark.gain import deployed_engine, measured_rows
from sparse_exp.benchmark.results import Row
from sparse_exp.engines import IsolatedEngine
from sparse_exp.engines.profile import LayerTime, Profile
from sparse_exp.errors import SparseExpError
from sparse_exp.hardware import physical_cpus
from sparse_exp.locks import default_lock_path, measuring_alone

_log = logging.getLogger(__name__)
Profiles = Mapping[str, Profile]


_SLOWEST = 8


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
