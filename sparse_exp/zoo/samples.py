"""Sample images of a published model and its predictions on them, to try the model and to verify it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_exp.config.imgsz import Imgsz
from sparse_exp.data import DetectionDataset, Sample, evenly_spread
from sparse_exp.data.loader import make_loader
from sparse_exp.engines import IsolatedEngine
from sparse_exp.errors import EngineError, MissingDependency
from sparse_exp.export.onnx import INPUT, OUTPUT
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.runs.deployment import MODEL

_log = logging.getLogger(__name__)
_IMAGES = 3
_ENGINES = ("onnxruntime", "deepsparse")  # those that SparseZoo's client knows
INPUTS, OUTPUTS = "sample-inputs", "sample-outputs"


def write_samples(directory: Path, dataset: DetectionDataset, imgsz: Imgsz) -> dict[str, str]:
    """Put validation images and their predictions beside a deployed model.

    Written are ``sample-originals`` and ``sample-labels`` (files of the data set), ``sample-inputs``
    (``inp-0000.npz``: uint8 (3, H, W)) and for each engine that can run here ``sample-outputs_<engine>``
    (``out-0000.npz``: float32 (A, 5 + nc)). Where only one engine can, it is called ``sample-outputs``.

    Args:
        directory: of the model, with ``model.onnx``.
        dataset: the images are taken from its validation split, evenly spread.
        imgsz: size of the images that the model takes.

    Returns:
        The directory of each engine's outputs, by engine.
    """
    samples = evenly_spread(dataset.splits["val"], _IMAGES)
    for number, sample in enumerate(samples):
        for kind, file in (("sample-originals", sample.image), ("sample-labels", sample.label)):
            if file.is_file():
                (directory / kind).mkdir(exist_ok=True)
                shutil.copyfile(file, directory / kind / f"{number:04}-{file.name}")
    images = _as_input(samples, len(dataset.names), imgsz)
    _save(directory / INPUTS, "inp", INPUT, images)
    outputs = dict(_outputs(directory / MODEL, images))
    folders = {engine: f"{OUTPUTS}_{engine}" if len(outputs) > 1 else OUTPUTS for engine in outputs}
    for engine, predictions in outputs.items():
        _save(directory / folders[engine], "out", OUTPUT, predictions)
    return folders


def read_samples(folder: Path) -> NDArray[np.generic]:
    """The arrays in a folder of samples: the first array of each file, stacked in the order of file names.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is no file, or the arrays differ in shape.
    """
    arrays = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as content:
            arrays.append(content[content.files[0]])
    return np.stack(arrays)


def predict_with(engine: str, model: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Predictions of a deployed model, in batches of one image.

    Args:
        engine: ``onnxruntime`` or ``deepsparse``.
        model: ONNX file.
        images: uint8 (N, 3, S, S).

    Returns:
        float32 (N, A, 5 + nc).

    Raises:
        MissingDependency: the engine is not installed.
        EngineError: it cannot run the model here.
    """
    with closing(IsolatedEngine(engine)) as running:
        running.load(model, batch_size=1, cores=usable_physical_cores())
        predictions: NDArray[np.float32] = running.run(images)[0]
    return predictions


def _outputs(model: Path, images: NDArray[np.uint8]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for engine in _ENGINES:
        try:
            yield engine, predict_with(engine, model, images)
        except (EngineError, MissingDependency) as error:
            _log.warning("No sample outputs of %s: %s", engine, error)


def _as_input(samples: Sequence[Sample], classes: int, imgsz: Imgsz) -> NDArray[np.uint8]:
    loader = make_loader(samples, classes, imgsz=imgsz, batch_size=len(samples), train=False)
    images: NDArray[np.uint8] = next(iter(loader)).images.contiguous().numpy()
    return images


def _save(folder: Path, prefix: str, name: str, arrays: NDArray[np.generic]) -> None:
    folder.mkdir()
    for number, array in enumerate(arrays):
        np.savez_compressed(folder / f"{prefix}-{number:04}.npz", **{name: array})
