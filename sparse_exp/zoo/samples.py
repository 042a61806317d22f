"""Sample images of a published model, and what it predicts on them: to try it, and to verify it by."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_exp.data import DetectionDataset, Sample
from sparse_exp.engines import IsolatedEngine
from sparse_exp.errors import EngineError, MissingDependency
from sparse_exp.export.onnx import INPUT, OUTPUT
from sparse_exp.hardware import usable_physical_cores

_log = logging.getLogger(__name__)
_IMAGES = 3
_ENGINES = ("onnxruntime", "deepsparse")  # those that SparseZoo's client knows
INPUTS, OUTPUTS = "sample-inputs", "sample-outputs"


def write_samples(directory: Path, dataset: DetectionDataset, imgsz: int) -> dict[str, str]:
    """Put validation images and their predictions beside a deployed model.

    Written are ``sample-originals`` and ``sample-labels`` (files of the data set), ``sample-inputs``
    (``inp-0000.npz``: uint8 (3, S, S)) and for each engine that can run here ``sample-outputs_<engine>``
    (``out-0000.npz``: float32 (A, 5 + nc)); where it is one engine alone, ``sample-outputs``.

    Args:
        directory: of the model, with ``model.onnx``.
        dataset: of which images of the validation split are taken, evenly.
        imgsz: side of the images that the model takes, in pixels.

    Returns:
        The directory of each engine's outputs, by engine.
    """
    samples = _spread(dataset.splits["val"])
    for number, sample in enumerate(samples):
        for kind, file in (("sample-originals", sample.image), ("sample-labels", sample.label)):
            if file.is_file():
                (directory / kind).mkdir(exist_ok=True)
                shutil.copyfile(file, directory / kind / f"{number:04}-{file.name}")
    images = _as_input(samples, len(dataset.names), imgsz)
    _save(directory / INPUTS, "inp", INPUT, images)
    outputs = dict(_outputs(directory / "model.onnx", images))
    folders = {engine: f"{OUTPUTS}_{engine}" if len(outputs) > 1 else OUTPUTS for engine in outputs}
    for engine, predictions in outputs.items():
        _save(directory / folders[engine], "out", OUTPUT, predictions)
    return folders


def read_samples(folder: Path) -> NDArray[np.generic]:
    """The arrays of a folder of samples, stacked in the order of their names; the first of each file.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is none, or they are no arrays of one shape.
    """
    arrays = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as content:
            arrays.append(content[content.files[0]])
    return np.stack(arrays)


def predict_with(engine: str, model: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Predictions of a deployed model, one image after the other.

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


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    positions = np.linspace(0, len(samples) - 1, min(_IMAGES, len(samples))).astype(int)
    return [samples[position] for position in positions]


def _as_input(samples: Sequence[Sample], classes: int, imgsz: int) -> NDArray[np.uint8]:
    from sparse_exp.data.loader import make_loader

    loader = make_loader(samples, classes, imgsz=imgsz, batch_size=len(samples), train=False)
    images: NDArray[np.uint8] = next(iter(loader)).images.contiguous().numpy()
    return images


def _save(folder: Path, prefix: str, name: str, arrays: NDArray[np.generic]) -> None:
    folder.mkdir()
    for number, array in enumerate(arrays):
        np.savez_compressed(folder / f"{prefix}-{number:04}.npz", **{name: array})
