"""Exported files held against the checkpoint they came from: structure, zeros, outputs, accuracy."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_exp.config.schema import ExportConfig
from sparse_exp.context import Context
from sparse_exp.engines import IsolatedEngine
from sparse_exp.errors import ExportError, expected
from sparse_exp.export.deployment import DENSE, MODEL, QDQ
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.sparsity.measure import (
    LayerSparsity,
    gzip_bytes,
    layer_sparsity,
    onnx_facts,
    overall,
    require_sparsity,
)
from sparse_exp.sparsity.recipe import is_quantized
from sparse_exp.training.checkpoints import restore
from sparse_exp.training.evaluation import Evaluation, evaluate
from sparse_exp.training.loop import as_input
from sparse_exp.yolov5 import YOLOv5

_log = logging.getLogger(__name__)
_COMPARED_IMAGES = 16
_CONFIDENT = 0.1  # objectness from which a prediction's box means something


def verify_deployment(context: Context) -> tuple[dict[str, float], dict[str, Any]]:
    """Check the exported files of a run.

    Returns:
        Metrics for ``result.json``, and for each engine its precision-recall curve.

    Raises:
        ExportError: a file is not what its checkpoint promises.
    """
    model, _ = restore(context.checkpoint)
    folder = context.run.path / "deployment"
    metrics: dict[str, float] = {}
    for name in (MODEL, QDQ):
        if (folder / name).is_file():
            layers = check_graph(folder / name, model)
            require_sparsity(layers, context.planned_sparsity, f"in {name}")
            metrics.setdefault("sparsity/onnx", overall(layers))
    metrics["quantized/convolutions"] = float(onnx_facts(folder / MODEL).quantized)
    metrics["quantizable/convolutions"] = float(len(model.quantizable_convolutions()))
    images = sample_images(context, _COMPARED_IMAGES)
    reference = predict(model, torch.from_numpy(images)).numpy()
    curves: dict[str, Any] = {}
    for engine in context.experiment.hardware.engines:
        differences, result = _try_engine(context, engine, images, reference)
        metrics.update({f"verify/{engine}/{name}": value for name, value in differences.items()})
        metrics[f"deployed/{engine}/map50"] = result.map50
        metrics[f"deployed/{engine}/map50_95"] = result.map50_95
        curves[engine] = {
            "recall": list(result.recall),
            "precision": list(result.precision),
            "ap": result.map50,
        }
    _check_accuracy(context, metrics)
    return metrics, curves


def check_graph(path: Path, model: YOLOv5) -> list[LayerSparsity]:
    """Check one exported file's structure against the model.

    Args:
        path: ONNX file.
        model: what it was exported from.

    Returns:
        Zeros of its prunable convolutions. Rounding weights to 8 bits may add some to those of the
        checkpoint, never take one.

    Raises:
        ExportError: it is no valid ONNX, a convolution is missing or not quantized, or lost zeros.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name} is no valid ONNX: {str(error).splitlines()[0]}") from error
    facts = onnx_facts(path)
    layers = {layer_name(layer.name): layer for layer in facts.layers}
    wanted = layer_sparsity(model.quantizable_convolutions())
    quantized = len(wanted) if is_quantized(list(model.state_dict())) else 0
    if facts.quantized != quantized or set(layers) != {layer.name for layer in wanted}:
        found = f"{facts.quantized} of {facts.convolutions}"
        do = "The export lost layers; report this with the recipe."
        raise ExportError(
            expected(f"quantized convolutions of {path.name}", f"{quantized} of {len(wanted)}", found, do)
        )
    _check_zeros(path, layers, wanted)
    return [layers[name] for name in model.prunable_convolutions()]


def layer_name(node: str) -> str:
    """The model's name of a convolution from its node's: ``/model/model.2/cv1/conv/module/Conv_quant``."""
    parts = [part for part in node.strip("/").split("/")[:-1] if part != "module"]
    following = [*parts[1:], ""]
    # A container's own name comes again in its children's: model/model.8/m/m.0.
    kept = [part for part, after in zip(parts, following, strict=True) if not after.startswith(f"{part}.")]
    return ".".join(kept).removesuffix(".module")


def _check_zeros(path: Path, layers: dict[str, LayerSparsity], wanted: list[LayerSparsity]) -> None:
    for layer in wanted:
        if layers[layer.name].zeros < layer.zeros:
            do = "The export changed the weights; report this with the recipe."
            raise ExportError(
                expected(
                    f"zeros of {layer.name} in {path.name}",
                    f"at least {layer.zeros}",
                    layers[layer.name].zeros,
                    do,
                )
            )


@torch.no_grad()
def predict(model: YOLOv5, images: Tensor) -> Tensor:
    """Predictions (N, A, 5 + nc) of a torch model in evaluation mode on uint8 images (N, 3, H, W)."""
    predictions: Tensor = model(as_input(images, torch.contiguous_format))[0]
    return predictions


def sample_images(context: Context, count: int) -> NDArray[np.uint8]:
    """The first images of the validation split, repeated if there are fewer: uint8 (count, 3, S, S)."""
    batches = [batch.images for batch in context.loader("val")]
    images = torch.cat(batches)
    picked: NDArray[np.uint8] = images[torch.arange(count) % len(images)].contiguous().numpy()
    return picked


def _try_engine(
    context: Context, name: str, images: NDArray[np.uint8], reference: NDArray[np.float32]
) -> tuple[dict[str, float], Evaluation]:
    trainer, hardware = context.experiment.trainer, context.experiment.hardware
    batch = trainer.val_batch_size
    with closing(IsolatedEngine(name)) as engine:
        cores = hardware.cores or usable_physical_cores()
        engine.load(context.deployed(name), batch_size=batch, cores=cores)
        chunks = [engine.run(images[start : start + batch])[0] for start in range(0, len(images), batch)]
        differences = compare(np.concatenate(chunks), reference)
        _check_differences(name, differences, context.experiment.export)
        result = evaluate(
            lambda batch: torch.from_numpy(engine.run(batch.numpy())[0]),
            context.loader("val"),
            num_classes=len(context.dataset.names),
            conf=trainer.conf,
            iou=trainer.iou,
            max_det=trainer.max_det,
            description=f"Evaluating {name}",
        )
    return differences, result


def compare(predictions: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
    """How far an engine's predictions are from torch's.

    Args:
        predictions: (N, A, 5 + nc).
        reference: the same of torch.

    Returns:
        Mean and largest absolute difference of the scores and of the boxes (pixels), over those
        predictions to which either gives an objectness of at least 0.1: thousands of others are near 0
        in both and would hide a difference. Where there is none, the scores are over all.
    """
    confident = np.maximum(reference[..., 4], predictions[..., 4]) >= _CONFIDENT
    compared = confident if confident.any() else np.ones_like(confident)
    scores = np.abs(predictions[..., 4:] - reference[..., 4:])[compared]
    boxes = np.abs(predictions[..., :4] - reference[..., :4])[confident]
    return {
        "score_mean": float(scores.mean()),
        "score_max": float(scores.max()),
        "box_mean_px": float(boxes.mean()) if boxes.size else 0.0,
        "box_max_px": float(boxes.max()) if boxes.size else 0.0,
    }


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


def _check_accuracy(context: Context, metrics: dict[str, float]) -> None:
    """Compare mAP with torch's, where the evaluate stage has measured it."""
    torch_map = context.run.result().get("val/map50")
    limit = context.experiment.export.map_atol
    if torch_map is None:
        return
    for engine in context.experiment.hardware.engines:
        deployed = metrics[f"deployed/{engine}/map50"]
        if deployed < torch_map - limit:
            do = "The exported graph loses accuracy; do not deploy it, or raise export.map_atol."
            raise ExportError(
                expected(f"mAP50 in {engine}", f"at least {torch_map - limit:.4f}", round(deployed, 4), do)
            )


def measure_sizes(folder: Path) -> dict[str, float]:
    """Sizes of the deployment in MB of 1e6 bytes: what DeepSparse is given, and the dense baseline."""
    sizes = {}
    for prefix, name in (("onnx", MODEL), ("dense_onnx", DENSE)):
        sizes[f"size/{prefix}_mb"] = (folder / name).stat().st_size / 1e6
        sizes[f"size/{prefix}_gzip_mb"] = gzip_bytes(folder / name) / 1e6
    return sizes
