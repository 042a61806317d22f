"""Accuracy and size of each cell of the square, so that its speed never stands alone.

Names in ``result.json``: ``deployed/<engine>/<variant>/map50`` and ``.../map50_95``; what the run deploys,
the variant ``sparse``, keeps its ``deployed/<engine>/map50``. Sizes in MB of 1e6 bytes:

- ``size/onnx_mb``, ``size/onnx_gzip_mb``, ``size/nonzero_mb``: of ``model.onnx``;
- ``size/qdq/onnx_mb``, ...: of ``model.qdq.onnx``, which other engines than DeepSparse run;
- ``size/dense_onnx_mb``, ...: of ``dense.onnx``; ``size/dense_checkpoint_mb`` of its checkpoint;
- ``size/sparse_fp32/onnx_mb``, ...: of ``sparse.fp32.onnx``;
- ``size/dense_int8/<engine>/onnx_mb``, ...: of the file of that engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_exp.engines import IsolatedEngine
from sparse_exp.engines.base import files_of
from sparse_exp.errors import EngineError, Impossible, MissingDependency
from sparse_exp.export.square import FOLDER, accuracy_prefix, model_for, size_prefix, weights_are_trained
from sparse_exp.sparsity.measure import MEGABYTE, gzip_bytes, nonzero_bytes
from sparse_exp.stages.base import Context
from sparse_exp.training.evaluation import Evaluation, evaluate

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileSizes:
    """Of one exported file, in MB of 1e6 bytes.

    Attributes:
        onnx_mb: as it lies on the disk, OpenVINO's ``.bin`` included.
        onnx_gzip_mb: compressed with gzip at its usual level.
        nonzero_mb: weights of convolutions that are not zero, each as wide as the engine computes with it.
    """

    onnx_mb: float
    onnx_gzip_mb: float
    nonzero_mb: float


@dataclass(frozen=True)
class Cell:
    """What is known of a cell's file; as plain data in the facts of the verify stage, under ``cells``.

    Attributes:
        engine: one of `sparse_exp.config.schema.ENGINES`.
        variant: one of `sparse_exp.config.schema.VARIANTS`.
        file: its name.
        map50: of this file in this engine on the validation split, 0..1; None where its weights are initial.
        map50_95: likewise.
        sizes: of the file; None of torch's checkpoints.
        impossible: why there is none; "" where there is one.
    """

    engine: str
    variant: str
    file: str = ""
    map50: float | None = None
    map50_95: float | None = None
    sizes: FileSizes | None = None
    impossible: str = ""


def measure_cells(context: Context, deployed: Mapping[str, float]) -> tuple[dict[str, float], list[Any]]:
    """Evaluate the files of all cells, each in its engine, and measure their sizes.

    Args:
        context: of a run whose export stage is finished.
        deployed: metrics of what the run deploys, ``deployed/<engine>/map50`` among them: these engines are
            not asked again.

    Returns:
        Metrics for ``result.json``; and each cell as plain data (see `Cell`).
    """
    hardware = context.experiment.hardware
    pairs = [(engine, variant) for variant in hardware.variants for engine in hardware.engines]
    sizes = sizes_in(context.run.path / FOLDER)
    cells = [_cell(context, engine, variant, deployed, sizes) for engine, variant in pairs]
    metrics = {name: value for cell in cells for name, value in _accuracy(cell, deployed)}
    metrics |= size_metrics(sizes) | _checkpoint_sizes(context)
    return metrics, [asdict(cell) for cell in cells]


def _cell(
    context: Context,
    engine: str,
    variant: str,
    deployed: Mapping[str, float],
    sizes: Mapping[str, FileSizes],
) -> Cell:
    try:
        file = model_for(context, engine, variant)
        known = [deployed.get(f"deployed/{engine}/{name}") for name in ("map50", "map50_95")]
        if variant != "sparse" or known[0] is None:
            known = _evaluated(context, engine, variant, file)
        map50, map50_95 = known
    except Impossible as error:
        return Cell(engine, variant, impossible=str(error))
    return Cell(engine, variant, file.name, map50, map50_95, sizes.get(file.name))


def _evaluated(context: Context, engine: str, variant: str, file: Path) -> list[float | None]:
    if not weights_are_trained(context, variant):
        return [None, None]
    result = evaluate_file(context, engine, file)
    _log.info("%s in %s: mAP50 %.4f (%s)", variant, engine, result.map50, file.name)
    return [result.map50, result.map50_95]


def evaluate_file(context: Context, engine: str, file: Path) -> Evaluation:
    """Measure the mAP of a file in an engine on the validation split.

    Raises:
        Impossible: the engine cannot load or run it; says why.
    """
    trainer = context.experiment.trainer
    try:
        with closing(IsolatedEngine(engine)) as runtime:
            runtime.load(file, batch_size=trainer.val_batch_size, cores=context.cores)
            return evaluate(
                lambda images: torch.from_numpy(runtime.run(images.numpy())[0]),
                context.loader("val"),
                num_classes=len(context.dataset.names),
                conf=trainer.conf,
                iou=trainer.iou,
                max_det=trainer.max_det,
                description=f"Verifying {engine}, {file.name}",
            )
    except (EngineError, MissingDependency) as error:
        raise Impossible(str(error)) from error


def _accuracy(cell: Cell, deployed: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    prefix = accuracy_prefix(cell.engine, cell.variant)
    for name in ("map50", "map50_95"):
        value = getattr(cell, name)
        if value is not None and prefix + name not in deployed:
            yield prefix + name, value


def sizes_in(folder: Path) -> dict[str, FileSizes]:
    """Sizes of the exported files of a deployment directory, by their names; not of torch's checkpoints."""
    return {file.name: file_sizes(file) for file in sorted([*folder.glob("*.onnx"), *folder.glob("*.xml")])}


def file_sizes(file: Path) -> FileSizes:
    """Sizes of one exported file.

    Args:
        file: ONNX; or ``.xml`` of OpenVINO, whose weights lie beside it as ``.bin``.
    """
    parts = files_of(file)
    nonzero = _nonzero_of_bin(parts[1]) if len(parts) > 1 else nonzero_bytes(file)
    sizes = sum(part.stat().st_size for part in parts), sum(gzip_bytes(part) for part in parts), nonzero
    return FileSizes(*(size / MEGABYTE for size in sizes))


def _nonzero_of_bin(file: Path) -> int:
    """Bytes that are not zero: nearly all of such a file is int8 weights."""
    return int(np.count_nonzero(np.frombuffer(file.read_bytes(), np.uint8)))


def size_metrics(sizes: Mapping[str, FileSizes]) -> dict[str, float]:
    """The metrics of files, whose names are those of `sparse_exp.export.square`."""
    metrics: dict[str, float] = {}
    for file, values in sizes.items():
        prefix = size_prefix(file)
        if prefix is not None:
            metrics |= {f"size/{prefix}{name}": value for name, value in asdict(values).items()}
    return metrics


def _checkpoint_sizes(context: Context) -> dict[str, float]:
    facts, prefixes = context.facts("export"), {"dense": "dense_", "sparse_fp32": "sparse_fp32/"}
    sizes = {prefix: facts.get(variant, {}).get("checkpoint_mb") for variant, prefix in prefixes.items()}
    return {f"size/{prefix}checkpoint_mb": size for prefix, size in sizes.items() if size is not None}
