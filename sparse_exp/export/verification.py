"""Exported files held against the checkpoint they came from: structure, zeros, outputs, accuracy.

Of a quantized network two right computations differ (see `sparse_exp.quantization.reference`): on a small
validation split mAP50 by some thousandths up or down, whichever engine it is. So the loss of mAP50 is the
mean over several `views` of the split, and comes with its standard error.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_exp.config.runtimes import runs_quantized
from sparse_exp.config.schema import Experiment, ExportConfig
from sparse_exp.data.loader import Batch
from sparse_exp.engines import IsolatedEngine
from sparse_exp.errors import ExportError, expected
from sparse_exp.export.differences import Differences, matched_shares
from sparse_exp.export.first_outputs import FirstOutputs
from sparse_exp.export.outputs import in_floating_point
from sparse_exp.quantization.quantizers import schemes_of
from sparse_exp.quantization.reference import as_deployed
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.recipes.recipe import is_quantized, quantized_layers
from sparse_exp.runs.deployment import ONNXRUNTIME, TORCH, Deployment
from sparse_exp.sparsity.measure import (
    LayerSparsity,
    layer_sparsity,
    listed,
    onnx_facts,
    overall,
    require_layer_sparsity,
    require_sparsity,
)
from sparse_exp.sparsity.onnx_graph import layer_name
from sparse_exp.training.evaluation import SMALLER, Evaluation, Predict, Validation, as_input
from sparse_exp.training.memory import no_memory_left
from sparse_exp.training.precision import Precision
from sparse_exp.yolov5 import YOLOv5

_log = logging.getLogger(__name__)
_ENOUGH_IMAGES = 100  # from so many on rounding moves mAP50 less than the tolerance
_BRIGHTER = (0, 1, -1, 2)  # grey levels of 255: no other picture, but every activation rounds anew
_KEPT_BYTES = 1 << 30  # of torch's predictions; of larger splits the rest is computed for each engine
_DOUBT = 2.0  # standard errors
_COARSER = 3.0  # differences where either the file or the torch model rounds outputs, too


@dataclass(frozen=True)
class Promise:
    """The zeros that exported files must have.

    Attributes:
        sparsity: share of zeros in all prunable convolutions, 0..1.
        layers: least share of each, by name, 0..1.
    """

    sparsity: float = 0.0
    layers: Mapping[str, float] = field(default_factory=dict)


def verify_deployment(
    deployment: Deployment,
    checkpoint: Path,
    validation: Validation,
    experiment: Experiment,
    *,
    promise: Promise,
    images: int,
    layout: torch.memory_format,
    device: torch.device,
    cores: int,
    first: FirstOutputs,
) -> tuple[dict[str, float], dict[str, Evaluation]]:
    """Check what a run deploys in each engine that can run it but torch, on the whole validation split.

    Args:
        deployment: the exported files.
        checkpoint: what they were exported from.
        validation: how accuracies are measured; its loader knows its own length.
        experiment: names engines, limits and the batch size of the evaluation.
        promise: the zeros that the files must have.
        images: of the validation split.
        layout: memory layout of torch's tensors.
        device: that torch computes on, in exact float32.
        cores: that engines run on.
        first: takes in what each engine puts out for the first images.

    Returns:
        Metrics for ``result.json``, and for each engine how well it found the boxes of the split.

    Raises:
        ExportError: a file is not what its checkpoint promises.
    """
    model, _ = restore(checkpoint)
    metrics = _check_files(deployment, model, promise)
    reference = _Reference(as_deployed(model), layout, device)
    rounds = is_quantized(list(model.state_dict()))
    rounds_outputs = any(scheme.outputs for scheme in schemes_of(model).values())
    shifts = views(images) if rounds else (0,)
    passes = _passes(validation, reference.from_the_start(), "torch", shifts[:1])
    passes += _passes(validation, reference.predict, "torch", shifts[1:])
    evaluations: dict[str, Evaluation] = {}
    for name in [name for name in experiment.hardware.engines if _runs(name, quantized=rounds)]:
        with closing(IsolatedEngine(name)) as engine:
            batch_size = experiment.trainer.val_batch_size
            file, limits = deployment.deployed(name), experiment.export
            if file.name == ONNXRUNTIME or rounds_outputs:
                boxes, scores = _COARSER * limits.box_atol, _COARSER * limits.score_atol
                limits = replace(limits, box_atol=boxes, score_atol=scores)
            engine.load(file, batch_size=batch_size, cores=cores)
            found, evaluations[name] = _try_engine(engine, name, validation, limits, reference, passes, first)
        metrics.update(found)
    return metrics, evaluations


def _runs(engine: str, *, quantized: bool) -> bool:
    """Whether an engine runs what is deployed; torch runs the checkpoint itself."""
    return engine != TORCH and (runs_quantized(engine) or not quantized)


def views(images: int) -> tuple[int, ...]:
    """How many grey levels brighter the split is looked at, beginning with 0: once each.

    Args:
        images: of the validation split. Below 100 it is looked at up to four times.
    """
    return _BRIGHTER[: min(len(_BRIGHTER), math.ceil(_ENOUGH_IMAGES / max(1, images)))]


class _Reference:
    """Torch's predictions on the split as it is, computed once as far as they fit in memory."""

    def __init__(self, model: YOLOv5, layout: torch.memory_format, device: torch.device) -> None:
        self._model, self._layout = model.to(device).to(memory_format=layout), layout
        self._device, self._exact = device, Precision(autocast=False, channels_last=True)
        self._kept: dict[int, Tensor] = {}

    def predict(self, images: Tensor) -> Tensor:
        with self._exact.on(self._device), no_memory_left("Verifying torch", SMALLER):
            return predict(self._model, images.to(self._device, non_blocking=True), self._layout).cpu()

    def from_the_start(self) -> Predict:
        """A function to be called with one batch of the split after the other."""
        numbers = itertools.count()
        return lambda images: self._at(next(numbers), images)

    def _at(self, batch: int, images: Tensor) -> Tensor:
        if batch in self._kept:
            return self._kept[batch]
        predictions = self.predict(images)
        if (batch + 1) * predictions.nbytes <= _KEPT_BYTES:
            self._kept[batch] = predictions
        return predictions


class _Brighter:
    """The batches of a loader, some grey levels brighter."""

    def __init__(self, loader: Iterable[Batch], levels: int) -> None:
        self._loader, self._levels = loader, levels

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for images, targets in self._loader:
            brighter = (images.short() + self._levels).clamp_(0, 255)
            yield Batch(brighter.to(torch.uint8), targets)


def _passes(validation: Validation, predict: Predict, name: str, shifts: tuple[int, ...]) -> list[Evaluation]:
    """One evaluation for each view of the split; that of the split as it is keeps its detections."""
    return [
        replace(
            validation, loader=_Brighter(validation.loader, levels) if levels else validation.loader
        ).evaluate(predict, description=f"Verifying {name}", keep_detections=levels == 0)
        for levels in shifts
    ]


def _check_files(deployment: Deployment, model: YOLOv5, promise: Promise) -> dict[str, float]:
    """Structure and zeros of each exported file."""
    metrics: dict[str, float] = {}
    for file in deployment.deployed_files:
        layers = check_graph(file, model)
        require_sparsity(layers, promise.sparsity, f"in {file.name}")
        require_layer_sparsity(layers, promise.layers, f"in {file.name}")
        metrics.setdefault("sparsity/onnx", overall(layers))
    metrics["quantized/convolutions"] = float(onnx_facts(deployment.model).quantized)
    metrics["quantizable/convolutions"] = float(len(model.quantizable_convolutions()))
    return metrics


def check_graph(path: Path, model: YOLOv5) -> list[LayerSparsity]:
    """Check one exported file's structure against the model.

    Args:
        path: ONNX file.
        model: what it was exported from.

    Returns:
        Zeros of its prunable convolutions, under the model's names. Rounding weights to 8 bits may add
        some to those of the checkpoint, never take one.

    Raises:
        ExportError: it is no valid ONNX, a convolution is missing or not quantized, or lost zeros; or it is
            the file for ONNX Runtime, which would compute a convolution in floating point.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name} is no valid ONNX: {str(error).splitlines()[0]}") from error
    facts = onnx_facts(path)
    layers = {layer_name(layer.name): layer for layer in facts.layers}
    wanted = layer_sparsity(model.quantizable_convolutions())
    quantized = len(quantized_layers(model))
    if facts.quantized != quantized or set(layers) != {layer.name for layer in wanted}:
        found = f"{facts.quantized} of {facts.convolutions}"
        do = "The export lost layers; report this with the recipe."
        raise ExportError(
            expected(f"quantized convolutions of {path.name}", f"{quantized} of {len(wanted)}", found, do)
        )
    if path.name == ONNXRUNTIME and (slow := in_floating_point(onnx.load(str(path)).graph)):
        do = "Their outputs are not quantized; report this with the recipe."
        raise ExportError(expected(f"all convolutions of {path.name}", "integer", listed(slow), do))
    _check_zeros(path, layers, wanted)
    return [replace(layers[name], name=name) for name in model.prunable_convolutions()]


def _check_zeros(path: Path, layers: dict[str, LayerSparsity], wanted: list[LayerSparsity]) -> None:
    """Refuse a file in which a layer has fewer zeros than in the checkpoint."""
    lost = [layer for layer in wanted if layers[layer.name].zeros < layer.zeros]
    if lost:
        named = listed([f"{x.name} ({layers[x.name].zeros} of {x.zeros})" for x in lost])
        raise ExportError(
            f"Expected every layer of {path.name} to keep the zeros of its checkpoint, but got fewer in "
            f"{named}. The export changed the weights; report this with the recipe."
        )


@torch.no_grad()
def predict(model: YOLOv5, images: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Predictions (N, A, 5 + nc) of a torch model in evaluation mode on uint8 images (N, 3, H, W)."""
    predictions: Tensor = model(as_input(images, layout))[0]
    return predictions


def sample_images(loader: Iterable[Batch], count: int) -> NDArray[np.uint8]:
    """The first images of a split, repeated if there are fewer: uint8 (count, 3, S, S)."""
    batches: list[Tensor] = []
    for batch in loader:
        batches.append(batch.images)
        if sum(map(len, batches)) >= count:
            break
    images = torch.cat(batches)
    picked: NDArray[np.uint8] = images[torch.arange(count) % len(images)].contiguous().numpy()
    return picked


def _try_engine(
    engine: IsolatedEngine,
    name: str,
    validation: Validation,
    limits: ExportConfig,
    reference: _Reference,
    torch_passes: list[Evaluation],
    first: FirstOutputs,
) -> tuple[dict[str, float], Evaluation]:
    """Metrics of one engine that has its file loaded, and its pass over the split as it is."""
    shifts, differences, of_torch = _BRIGHTER[: len(torch_passes)], Differences(), reference.from_the_start()

    run = first.watching(name, "sparse", lambda images: torch.from_numpy(engine.run(images.numpy())[0]))

    def run_and_compare(images: Tensor) -> Tensor:
        predictions = run(images)
        differences.update(predictions, of_torch(images))
        return predictions

    passes = _passes(validation, run_and_compare, name, shifts[:1])
    found = differences.result()
    _check_differences(name, found, limits)
    passes += _passes(validation, run, name, shifts[1:])
    found |= matched_shares(passes[0].detections, torch_passes[0].detections)
    gains = [ours.map50 - theirs.map50 for ours, theirs in zip(passes, torch_passes, strict=True)]
    found |= {"map50_difference": statistics.fmean(gains), "map50_difference_error": standard_error(gains)}
    _check_accuracy(name, found["map50_difference"], found["map50_difference_error"], limits.map_atol)
    metrics = {f"verify/{name}/{key}": value for key, value in found.items()}
    metrics[f"deployed/{name}/map50"] = passes[0].map50
    metrics[f"deployed/{name}/map50_95"] = passes[0].map50_95
    return metrics, passes[0]


def standard_error(values: list[float]) -> float:
    """Of the mean of independent values; 0 where there is only one, and nothing is known of it."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _check_differences(engine: str, differences: dict[str, float], limits: ExportConfig) -> None:
    for key, limit, unit in (
        ("score_mean", limits.score_atol, ""),
        ("box_mean_px", limits.box_atol, " px"),
    ):
        if not differences[key] <= limit:
            do = "The exported graph does not compute what the checkpoint does; do not deploy it."
            raise ExportError(
                expected(f"{key} of {engine} against torch", f"at most {limit:g}{unit}", differences[key], do)
            )


def _check_accuracy(engine: str, gain: float, error: float, limit: float) -> None:
    """Refuse a loss of mAP50 that is, beyond the doubt that rounding leaves, larger than the limit."""
    if not -gain <= limit + _DOUBT * error:
        doubt = f" and {_DOUBT:g} standard errors ({error:.4f})" if error else ""
        do = "The exported graph loses accuracy; do not deploy it, or raise export.map_atol."
        raise ExportError(
            expected(f"the mAP50 that {engine} loses against torch", f"at most {limit:g}{doubt}",
                     round(-gain, 4), do)
        )  # fmt: skip
