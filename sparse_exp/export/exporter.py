"""The deployment directory of a trained detector; see `sparse_exp.runs.deployment` for what lies in it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto

from sparse_exp import __version__
from sparse_exp.config.imgsz import Imgsz, in_words
from sparse_exp.config.schema import Experiment
from sparse_exp.data import DetectionDataset
from sparse_exp.data.attributions import licences_of
from sparse_exp.engines.base import reason
from sparse_exp.errors import Impossible
from sparse_exp.export.networks import Network, dense_network, initial_network, sparse_network, zeros
from sparse_exp.export.onnx import (
    FileForm,
    export_float,
    export_integer,
    export_onnxruntime,
    export_qdq,
    trace_quantized,
)
from sparse_exp.export.post_training import Images, quantize_onnxruntime, quantize_openvino
from sparse_exp.files import sha256_of
from sparse_exp.progress import progress
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.recipes.recipe import Recipe, is_quantized
from sparse_exp.runs.deployment import (
    CHECKPOINTS,
    DENSE,
    MODEL,
    ONNXRUNTIME,
    QDQ,
    SPARSE_FP32,
    dense_int8,
    wanted_files,
)
from sparse_exp.runs.directory import Run
from sparse_exp.training.oneshot import calibration_loader
from sparse_exp.yolov5 import Checkpoint, YOLOv5, save_checkpoint

_log = logging.getLogger(__name__)

# Weights per output channel: of the trees' dense yolov5s calibration then costs 0.006 of mAP50, and 0.06
# with one scale for a whole layer.
_QUANTIZE = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 1.0
  - !QuantizationModifier
    start_epoch: 0.0
    scheme:
      input_activations: {num_bits: 8, symmetric: False}
      weights: {num_bits: 8, symmetric: True, strategy: channel}
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""


def export_run(
    experiment: Experiment, run: Run, checkpoint: Path, dataset: DetectionDataset
) -> tuple[list[Path], dict[str, Any]]:
    """Write all files that a run's hardware target asks for.

    Args:
        experiment: of the run.
        run: its training is finished.
        checkpoint: what it deploys.
        dataset: its training images calibrate the dense network.

    Returns:
        The files, and facts for later stages: ``imgsz``; of ``dense`` and ``sparse_fp32`` where the weights
        come from (``origin``), whether they are ``trained``, and the size of their checkpoint in MB;
        ``impossible``: why a file is not there, by its name.
    """
    exports = _Exports(experiment, run, checkpoint, dataset)
    files: list[Path] = []
    impossible: dict[str, str] = {}
    run.deployment.clear()
    steps = exports.steps()
    with progress("Exporting", total=len(steps), unit="files") as bar:
        for name, make in steps.items():
            try:
                files += make()
            except Impossible as error:
                impossible[name] = str(error)
                _log.info("No %s: %s", name, error)
            bar.advance()
    return files, {"imgsz": exports.imgsz, **exports.networks(), "impossible": impossible}


def export_deployment(
    model: YOLOv5, folder: Path, form: FileForm, *, dense: YOLOv5 | None = None, images: Images = ()
) -> list[Path]:
    """Write ``model.onnx`` and ``dense.onnx``; for a quantized model the files of the other engines.

    Args:
        model: the trained detector in evaluation mode, its quantizers frozen.
        folder: where to write.
        form: of all files.
        dense: the fp32 baseline of the same architecture and classes; None: one with initial weights.
        images: batches, uint8 (N, 3, S, S), that ONNX Runtime's file finds ranges with; without them there
            is no such file.

    Returns:
        The files.
    """
    export_float(dense or initial_network(model), folder / DENSE, form)
    if not _is_quantized(model):
        export_float(model, folder / MODEL, form)
        return [folder / DENSE, folder / MODEL]
    traced = trace_quantized(model, form)
    files = [folder / DENSE, *_export_quantized(traced, folder)]
    if images:
        export_onnxruntime(traced, folder / ONNXRUNTIME, images)
        files.append(folder / ONNXRUNTIME)
    return files


def _is_quantized(model: YOLOv5) -> bool:
    return is_quantized(list(model.state_dict()))


def _export_quantized(traced: ModelProto, folder: Path) -> list[Path]:
    """Write the files that need no images."""
    export_integer(traced, folder / MODEL)
    export_qdq(traced, folder / QDQ)
    return [folder / MODEL, folder / QDQ]


def export_dense_integer(dense: YOLOv5, destination: Path, images: Images, form: FileForm) -> None:
    """Calibrate a dense network and export it with integer convolutions, for DeepSparse.

    Args:
        dense: in fp32 and evaluation mode; left as it is.
        destination: ONNX file to write.
        images: batches, uint8 (N, 3, S, S), to calibrate with.
        form: of the file.
    """
    model = copy.deepcopy(dense)
    batches = (torch.from_numpy(batch).float() / 255 for batch in images)
    Recipe(_QUANTIZE, name="the calibration").apply_at_once(model, batches)
    export_integer(trace_quantized(model, form), destination)


Step = Callable[[], list[Path]]


@dataclass
class _Exports:
    """The files of one run, each made by a method."""

    experiment: Experiment
    run: Run
    file: Path
    dataset: DetectionDataset

    def __post_init__(self) -> None:
        self.folder = self.run.deployment.folder
        self.model, self.checkpoint = restore(self.file)
        self.imgsz = self.experiment.dataset.imgsz
        if self.checkpoint.imgsz not in (None, self.imgsz):
            trained, own = in_words(self.checkpoint.imgsz), in_words(self.imgsz)
            _log.warning("The checkpoint was trained at %s px, and is exported for %s px.", trained, own)

    @cached_property
    def deployed(self) -> Network:
        return Network(self.model, "the run's own", self.file)

    @cached_property
    def dense(self) -> Network:
        return dense_network(self.run, self.file, self.model)

    @cached_property
    def sparse(self) -> Network | str:
        return sparse_network(self.model, self.run.before_quantization(self.file))

    @cached_property
    def traced(self) -> ModelProto:
        """The graph of the deployed network, if that is quantized."""
        return trace_quantized(self.model, self._form(self.deployed))

    @cached_property
    def images(self) -> Images:
        experiment, dataset = self.experiment, self.dataset
        if not dataset.splits.get("train"):
            raise Impossible(f"The data set {dataset.name} has no training images to calibrate with.")
        count, batch_size = experiment.recipe.calibration_images, experiment.trainer.val_batch_size
        loader = calibration_loader(
            dataset, count, imgsz=self.imgsz, batch_size=batch_size, seed=experiment.seed
        )
        return [batch.images.contiguous().numpy() for batch in loader]

    def steps(self) -> dict[str, Step]:
        """What makes each file, by its name, in an order in which a file comes after those it needs."""
        hardware = self.experiment.hardware
        made: dict[str, Step] = {
            MODEL: self._model,
            ONNXRUNTIME: self._onnxruntime,
            DENSE: lambda: self._float(self.dense, DENSE),
            SPARSE_FP32: lambda: self._float(self._sparse(), SPARSE_FP32),
            CHECKPOINTS["dense"]: lambda: self._save(self.dense, CHECKPOINTS["dense"]),
            CHECKPOINTS["sparse_fp32"]: lambda: self._save(self._sparse(), CHECKPOINTS["sparse_fp32"]),
            dense_int8("deepsparse"): self._int8_deepsparse,
            dense_int8("onnxruntime"): self._int8_onnxruntime,
            dense_int8("openvino"): self._int8_openvino,
        }
        wanted = {MODEL, DENSE, *wanted_files(hardware.engines, hardware.variants)}
        if _is_quantized(self.model):
            wanted.add(ONNXRUNTIME)
        return {name: make for name, make in made.items() if name in wanted}

    def _form(self, network: Network) -> FileForm:
        run, fetched = self.run, self.run.facts("fetch")
        sources = fetched.get("origin", ""), fetched.get("grown_from", ""), self.experiment.dataset.generator
        facts: dict[str, object] = {
            "version": __version__,
            "run": f"{self.experiment.name}, {run.path.parent.name}/{run.path.name}",
            "sparsity": round(zeros(network.model), 6),
            "licence": " ".join(licences_of(" ".join(map(str, sources)), Path(self.experiment.paths.zoo))),
        }
        if network.checkpoint:
            facts["checkpoint_sha256"] = sha256_of(network.checkpoint)
        if network is not self.dense:
            facts["recipe"] = self.experiment.recipe.name
        return FileForm(self.imgsz, self.experiment.export.opset, self.checkpoint.names, facts)

    def networks(self) -> dict[str, Any]:
        """Where the weights of the other networks come from, for the facts."""
        found = {"dense": self.dense}
        if "sparse_fp32" in self.experiment.hardware.variants and isinstance(self.sparse, Network):
            found["sparse_fp32"] = self.sparse
        return {name: _described(network, self.folder / CHECKPOINTS[name]) for name, network in found.items()}

    def _sparse(self) -> Network:
        if isinstance(self.sparse, str):
            raise Impossible(self.sparse)
        return self.sparse

    def _float(self, network: Network, name: str) -> list[Path]:
        export_float(network.model, self.folder / name, self._form(network))
        return [self.folder / name]

    def _model(self) -> list[Path]:
        if _is_quantized(self.model):
            return _export_quantized(self.traced, self.folder)
        return self._float(self.deployed, MODEL)

    def _onnxruntime(self) -> list[Path]:
        file = self.folder / ONNXRUNTIME
        export_onnxruntime(self.traced, file, self.images)
        return [file]

    def _save(self, network: Network, name: str) -> list[Path]:
        self.folder.mkdir(exist_ok=True)
        _save_checkpoint(self.folder / name, network, self.checkpoint, self.imgsz)
        return [self.folder / name]

    def _int8_deepsparse(self) -> list[Path]:
        file = self.folder / dense_int8("deepsparse")
        form = self._form(self.dense)
        _attempt(file, lambda: export_dense_integer(self.dense.model, file, self.images, form))
        return [file]

    def _int8_onnxruntime(self) -> list[Path]:
        file, entries = self.folder / dense_int8("onnxruntime"), self._form(self.dense).entries
        _attempt(file, lambda: quantize_onnxruntime(self.folder / DENSE, file, self.images, entries))
        return [file]

    def _int8_openvino(self) -> list[Path]:
        file = self.folder / dense_int8("openvino")
        _attempt(file, lambda: quantize_openvino(self.folder / DENSE, file, self.images))
        return [file, file.with_suffix(".bin")]


def _attempt(file: Path, make: Callable[[], None]) -> None:
    """Quantize; what another library cannot do ends a cell of the square, not the run.

    Raises:
        Impossible: it failed; says why.
    """
    try:
        make()
    except Impossible:
        raise
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise Impossible(f"{package} is not installed. Run: pip install {package}.") from error
    except Exception as error:
        _log.debug("%s failed", file.name, exc_info=True)
        raise Impossible(f"{file.name} could not be made: {reason(error)}") from error


def _save_checkpoint(path: Path, network: Network, checkpoint: Checkpoint, imgsz: Imgsz) -> None:
    """One of this project's checkpoints, whatever format the weights came in."""
    save_checkpoint(
        path,
        model_state=network.model.state_dict(),
        size=network.model.size,
        num_classes=network.model.num_classes,
        names=checkpoint.names,
        imgsz=imgsz,
        recipe="",
        phase=path.name.split(".")[0].replace("sparse", "pruned"),
        epoch=0.0,
        metrics={},
        widths=network.model.widths,
    )


def _described(network: Network, saved: Path) -> dict[str, Any]:
    """``saved``: where its checkpoint was written for torch, if it was; it counts where it has no other."""
    file = network.checkpoint or (saved if saved.is_file() else None)
    size = file.stat().st_size / 1e6 if file else None
    return {"origin": network.origin, "trained": network.trained, "checkpoint_mb": size}
