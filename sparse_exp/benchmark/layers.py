"""Which layers take the time of the deployed network: profiles of engines, summed up by kind of layer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_exp.benchmark.cells import Cell
from sparse_exp.benchmark.gain import deployed_row, first_network
from sparse_exp.benchmark.measurements import Row, measured
from sparse_exp.engines import IsolatedEngine
from sparse_exp.engines.profile import LayerTime, Profile
from sparse_exp.errors import SparseExpError
from sparse_exp.hardware import physical_cpus
from sparse_exp.locks import default_lock_path, measuring_alone

_log = logging.getLogger(__name__)

Profiles = Mapping[str, Profile]  # by <engine>/<variant>
_SLOWEST = 8  # layers that are named
# Kinds of layers, by the words that the engines have for them; the first pattern that fits counts.
_KINDS = {
    "sparse convolution": r"sparse convolution",
    "layout changes": r"shuffle|reorder|transpose|permute|layout|reformat",
    "several layers, tile by tile": r"tile by tile",
    "dense convolution": r"conv|winograd",
    "quantization": r"quanti[sz]e",
    "pooling and resizing": r"pool|resize|upsample|interpolate",
    "element by element": r"mul|add|div|sigmoid|silu|swish|gelu|eltwise|elementwise|batchnorm|subgraph",
    "other": r"",
}
# In the last module of a detector, all but its convolutions turn raw outputs into boxes and scores.
_DECODING = re.compile(r"model\.24/(?!m\.\d)")


@dataclass(frozen=True)
class Layer:
    """One of the slowest layers.

    Attributes:
        name: as the engine calls it.
        kind: see `kind_of`.
        ms: milliseconds of one inference of a batch.
        share: of the time of all layers, 0..1.
    """

    name: str
    kind: str
    ms: float
    share: float


@dataclass(frozen=True)
class Costs:
    """Where the time of one network in one engine goes.

    Attributes:
        cell: ``<engine>/<variant>``.
        ms: milliseconds of one inference of a batch, summed over the layers; more than without a profiler.
        kinds: share of the time by kind of layer, 0..1, largest first.
        layers: the slowest, slowest first.
        supported: share of the operators for which the engine has optimized code, 0..1; None: unknown.
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
    """Time the layers of the deployed network, and of the dense one in the same engine.

    Nothing else is measured on the host meanwhile. The engine runs one stream, with the options that were
    tuned for the first load.

    Args:
        cells: what was measured.
        rows: the measurements.
        images: uint8 (N, 3, H, W), at least a batch of them.
        lock_path: file of the host-wide lock; None: `default_lock_path`.

    Returns:
        Profiles by ``<engine>/<variant>``. A network that the engine cannot profile is left out, and
        logged.
    """
    found = first_network(measured(rows))
    deployed = deployed_row(found)
    engine = deployed["engine"] if deployed else ""
    profiles: dict[str, Profile] = {}
    with measuring_alone(lock_path or default_lock_path()):
        for variant in ("sparse", "dense"):
            row = next((r for r in found if (r["engine"], r["variant"]) == (engine, variant)), None)
            cell = next((each for each in cells if row and _is_measured_in(row, each)), None)
            if cell is None or row is None:
                continue
            try:
                profiles[f"{engine}/{variant}"] = _profile(cell, row, images)
            except SparseExpError as error:
                _log.warning("The layers of %s/%s could not be timed: %s", engine, variant, error)
    return profiles


def _is_measured_in(row: Row, cell: Cell) -> bool:
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
        cell: ``<engine>/<variant>``.
        profile: its layers.
    """
    total = sum(layer.ms for layer in profile.layers)
    shares = [
        Layer(layer.name, kind_of(layer), layer.ms, layer.ms / (total or 1.0)) for layer in profile.layers
    ]
    kinds: dict[str, float] = {}
    for layer in shares:
        kinds[layer.kind] = kinds.get(layer.kind, 0.0) + layer.share
    return Costs(
        cell=cell,
        ms=total,
        kinds=dict(sorted(kinds.items(), key=lambda item: -item[1])),
        layers=tuple(sorted(shares, key=lambda layer: layer.ms, reverse=True)[:_SLOWEST]),
        supported=profile.supported,
        note=profile.note,
    )


def kind_of(layer: LayerTime) -> str:
    """What a layer does, in the same words for all engines.

    >>> kind_of(LayerTime("/model.24/Sigmoid", "Sigmoid", 1.0))
    'decoding'
    """
    if _DECODING.search(layer.name):
        return "decoding"
    kind = layer.kind.lower()
    return next(name for name, pattern in _KINDS.items() if re.search(pattern, kind))
