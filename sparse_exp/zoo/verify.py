"""Check a published model: its files against their hashes, and what they hold against ``model.json``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_exp.config.schema import ExportConfig
from sparse_exp.errors import EngineError, MissingDependency, first_line
from sparse_exp.export.differences import Differences
from sparse_exp.runs.deployment import MODEL
from sparse_exp.sources.layout import checkpoint_in
from sparse_exp.sources.local import METADATA, SUMS, read_metadata
from sparse_exp.zoo.checksums import changed_files
from sparse_exp.zoo.facts import measure_checkpoint, onnx_sparsity
from sparse_exp.zoo.samples import INPUTS, predict_with, read_samples

_SAME_SPARSITY = 1e-4


def verify(directory: Path) -> Iterator[str]:
    """Check a model.

    Compared are its files with their hashes; the architecture, classes, zeros and quantization of its
    checkpoint and the zeros of its ONNX file with ``model.json``; and its sample outputs with what each
    engine computes here. Two CPUs may round 8-bit numbers differently, so outputs may differ as much as
    those of an exported file from those of its checkpoint (`export.score_atol`, `export.box_atol`).

    Args:
        directory: of the model.

    Yields:
        A sentence for each difference, beginning with the file.
    """
    metadata = read_metadata(directory)
    if not metadata:
        yield f"{METADATA} is missing or cannot be read"
        return
    if not (directory / SUMS).is_file():
        yield f"{SUMS} is missing"
    yield from changed_files(directory)
    for check in (_checkpoint, _onnx, _samples):
        try:
            yield from check(directory, metadata)
        except Exception as error:  # each library raises errors of its own for a damaged file
            yield f"The {check.__name__.lstrip('_')} cannot be read: {first_line(error)}"


def _checkpoint(directory: Path, metadata: dict[str, Any]) -> Iterator[str]:
    path = checkpoint_in(directory, "postqat")
    found, name = measure_checkpoint(path), path.relative_to(directory).as_posix()
    if abs(found.sparsity - metadata["sparsity"]) > _SAME_SPARSITY:
        yield f"{name} has {found.sparsity:.2%} zeros, and {METADATA} says {metadata['sparsity']:.2%}"
    pairs = {
        "size": found.size,
        "quantized": found.quantized,
        "classes": list(found.names),
    }
    for key, value in pairs.items():
        if metadata[key] != value:
            yield f"{name} has {key} {value}, and {METADATA} says {metadata[key]}"


def _onnx(directory: Path, metadata: dict[str, Any]) -> Iterator[str]:
    promised = metadata["metrics"].get("sparsity/onnx")
    if promised is None or not (directory / MODEL).is_file():
        return
    found = onnx_sparsity(directory / MODEL)
    if abs(found - promised) > _SAME_SPARSITY:
        yield f"{MODEL} has {found:.2%} zeros, and {METADATA} says {promised:.2%}"


def _samples(directory: Path, metadata: dict[str, Any]) -> Iterator[str]:
    if not metadata["samples"]:
        return
    images = read_samples(directory / INPUTS).astype(np.uint8, copy=False)
    for engine, folder in metadata["samples"].items():
        wanted = read_samples(directory / folder)
        try:
            found = predict_with(engine, directory / MODEL, images)
        except (MissingDependency, EngineError) as error:
            yield f"{folder} cannot be compared: {error}"
            continue
        yield from _difference(folder, engine, found, wanted)


def _difference(folder: str, engine: str, found: Any, wanted: Any) -> Iterator[str]:

    if found.shape != wanted.shape:
        yield f"{folder} has outputs of shape {wanted.shape}, and {engine} gives {found.shape}"
        return
    differences, limits = Differences(), ExportConfig()
    differences.update(torch.from_numpy(found), torch.from_numpy(wanted))
    result = differences.result()
    for key, limit in (("score_mean", limits.score_atol), ("box_mean_px", limits.box_atol)):
        if not result[key] <= limit:
            yield f"{folder} is not what {engine} gives: {key} {result[key]:.3g}, at most {limit:g} expected"
