"""Accuracy and size of the file of each engine and variant, so that its speed never stands alone.

Names in ``result.json``: ``deployed/<engine>/<variant>/map50`` and ``.../map50_95``; what the run deploys,
the variant ``sparse``, keeps its ``deployed/<engine>/map50``. Sizes in MB of 1e6 bytes:

- ``size/onnx_mb``, ``size/onnx_gzip_mb``, ``size/nonzero_mb``: of ``model.onnx``;
- ``size/qdq/onnx_mb``, ...: of ``model.qdq.onnx``, which OpenVINO runs;
- ``size/onnxruntime/onnx_mb``, ...: of ``model.onnxruntime.onnx``;
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

from sparse_exp.config.schema import Experiment
from sparse_exp.engines import IsolatedEngine
from sparse_exp.engines.base import files_of
from sparse_exp.errors import EngineError, Impossible, MissingDependency
from sparse_exp.export.first_outputs import FirstOutputs
from sparse_exp.runs.deployment import Deployment, accuracy_prefix, size_prefix
from sparse_exp.sparsity.measure import MEGABYTE, gzip_bytes, nonzero_bytes
from sparse_exp.training.evaluation import Evaluation, Validation

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
class MeasuredFile:
    """What is known of a file; as plain data in the facts of the verify stage, under ``cells``.

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


def measure_files(
    deployment: Deployment,
    validation: Validation,
    experiment: Experiment,
    deployed: Mapping[str, float],
    *,
    checkpoints: Mapping[str, Any],
    cores: int,
    first: FirstOutputs,
) -> tuple[dict[str, float], list[dict[str, Any]], dict[tuple[str, str], Evaluation]]:
    """Evaluate the file of each engine and variant of the target in its engine, and measure its size.

    Args:
        deployment: the exported files.
        validation: how accuracies are measured.
        experiment: names engines, variants and the batch size of the evaluation.
        deployed: metrics of what the run deploys, ``deployed/<engine>/map50`` among them: these engines are
            not asked again.
        checkpoints: facts of the export stage: sizes of the checkpoints of ``dense`` and ``sparse_fp32``.
        cores: that engines run on.
        first: takes in what each file puts out for the first images.

    Returns:
        Metrics for ``result.json``; each file as plain data (see `MeasuredFile`); and how well the boxes of
        the split were found, by engine and variant, of those that were evaluated here.
    """
    hardware, batch_size = experiment.hardware, experiment.trainer.val_batch_size
    sizes = {file.name: file_sizes(file) for file in deployment.files}
    found: list[MeasuredFile] = []
    evaluations: dict[tuple[str, str], Evaluation] = {}
    for variant in hardware.variants:
        for engine in hardware.engines:
            map50, map50_95 = (deployed.get(f"deployed/{engine}/{name}") for name in ("map50", "map50_95"))
            try:
                file = deployment.file(engine, variant)
                if not deployment.is_trained(variant):
                    map50 = map50_95 = None
                elif variant != "sparse" or map50 is None:
                    result = evaluate_file(
                        validation, engine, variant, file, batch_size=batch_size, cores=cores, first=first
                    )
                    _log.info("%s in %s: mAP50 %.4f (%s)", variant, engine, result.map50, file.name)
                    map50, map50_95 = result.map50, result.map50_95
                    evaluations[engine, variant] = result
            except Impossible as error:
                found.append(MeasuredFile(engine, variant, impossible=str(error)))
            else:
                found.append(MeasuredFile(engine, variant, file.name, map50, map50_95, sizes.get(file.name)))
    metrics = {name: value for one in found for name, value in _accuracy(one, deployed)}
    metrics |= size_metrics(sizes) | _checkpoint_sizes(checkpoints)
    return metrics, [asdict(one) for one in found], evaluations


def evaluate_file(
    validation: Validation,
    engine: str,
    variant: str,
    file: Path,
    *,
    batch_size: int,
    cores: int,
    first: FirstOutputs,
) -> Evaluation:
    """Measure the mAP of a file in an engine on the validation split.

    Args:
        validation: how accuracies are measured.
        engine: one of `sparse_exp.config.schema.ENGINES`.
        variant: one of `sparse_exp.config.schema.VARIANTS`.
        file: that it loads.
        batch_size: images at once, that of the split's loader.
        cores: that the engine runs on.
        first: takes in what it puts out for the first images.

    Raises:
        Impossible: the engine cannot load or run it; says why.
    """
    try:
        with closing(IsolatedEngine(engine)) as runtime:
            runtime.load(file, batch_size=batch_size, cores=cores)
            predict = first.watching(
                engine, variant, lambda images: torch.from_numpy(runtime.run(images.numpy())[0])
            )
            return validation.evaluate(predict, description=f"Verifying {engine}, {file.name}")
    except (EngineError, MissingDependency) as error:
        raise Impossible(str(error)) from error


def _accuracy(one: MeasuredFile, deployed: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    prefix = accuracy_prefix(one.engine, one.variant)
    for name in ("map50", "map50_95"):
        value = getattr(one, name)
        if value is not None and prefix + name not in deployed:
            yield prefix + name, value


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
    """The metrics of files, whose names are those of `sparse_exp.runs.deployment`."""
    metrics: dict[str, float] = {}
    for file, values in sizes.items():
        prefix = size_prefix(file)
        if prefix is not None:
            metrics |= {f"size/{prefix}{name}": value for name, value in asdict(values).items()}
    return metrics


def _checkpoint_sizes(facts: Mapping[str, Any]) -> dict[str, float]:
    prefixes = {"dense": "dense_", "sparse_fp32": "sparse_fp32/"}
    sizes = {prefix: facts.get(variant, {}).get("checkpoint_mb") for variant, prefix in prefixes.items()}
    return {f"size/{prefix}checkpoint_mb": size for prefix, size in sizes.items() if size is not None}
