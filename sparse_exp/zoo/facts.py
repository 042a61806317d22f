"""What is measured in a model's files: architecture, zeros, quantization."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sparse_exp.config.imgsz import Imgsz
from sparse_exp.recipes.recipe import is_quantized
from sparse_exp.sparsity.measure import (
    LayerSparsity,
    in_blocks,
    onnx_facts,
    overall,
    state_sparsity,
    stock_macs,
    total_macs,
)
from sparse_exp.sparsity.onnx_graph import layer_name
from sparse_exp.yolov5 import Checkpoint, read_checkpoint
from sparse_exp.yolov5.channels import build_detector
from sparse_exp.yolov5.model import STRIDES

_NOT_PRUNABLE = ("model.0.", "model.24.")  # stem and head


@dataclass(frozen=True)
class Measured:
    """What a checkpoint file holds.

    Attributes:
        size: n, s, m, l or x.
        names: of the classes.
        imgsz: size of the training images; None where the file does not say.
        sparsity: share of zeros in the prunable convolutions, 0..1.
        quantized: whether it went through quantization-aware training.
        block4: whether the zeros come in blocks of four input channels.
        work: multiplications as a share of those of the stock size, 0..1.
        ours: whether this project wrote it.
        phase: of the training, as in `sparse_exp.yolov5.Checkpoint`; "" where the file does not say.
        recipe: the SparseML recipe that the weights went through; "" for none.
        metrics: that were recorded with the weights, by name.
    """

    size: str
    names: tuple[str, ...]
    imgsz: Imgsz | None
    sparsity: float
    quantized: bool
    block4: bool
    work: float
    ours: bool
    phase: str
    recipe: str
    metrics: dict[str, float]


def measure_checkpoint(path: Path) -> Measured:
    """Read a checkpoint and count its zeros.

    Raises:
        CheckpointError: it cannot be read, or is no YOLOv5 v6/v7.
    """
    checkpoint = read_checkpoint(path)
    sparsity = overall(_prunable(state_sparsity(checkpoint.state_dict)))
    weights = (
        tensor
        for name, tensor in checkpoint.state_dict.items()
        if name.endswith(".weight") and tensor.ndim == 4 and not name.startswith(_NOT_PRUNABLE)
    )
    return Measured(
        checkpoint.size,
        checkpoint.names,
        checkpoint.imgsz,
        sparsity,
        is_quantized(list(checkpoint.state_dict)),
        in_blocks(weights),
        _work(checkpoint),
        checkpoint.format == "sparse_exp",
        checkpoint.phase or "",
        checkpoint.recipe,
        checkpoint.metrics,
    )


def _work(checkpoint: Checkpoint) -> float:
    if not checkpoint.widths:
        return 1.0
    size, classes, imgsz = checkpoint.size, checkpoint.num_classes, STRIDES[-1]
    own = build_detector(size, classes, checkpoint.widths).quantizable_convolutions()
    return total_macs(own, imgsz) / stock_macs(size, classes, imgsz)


def onnx_sparsity(path: Path) -> float:
    """Share of zeros in the prunable convolutions of an ONNX file, 0..1.

    Layers of a file that another project exported may have other names than ours; then all of them count.
    """
    named = [replace(layer, name=layer_name(layer.name)) for layer in onnx_facts(path).layers]
    return overall(_prunable(named))


def _prunable(layers: list[LayerSparsity]) -> list[LayerSparsity]:
    return [layer for layer in layers if not f"{layer.name}.".startswith(_NOT_PRUNABLE)]
