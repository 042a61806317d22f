"""What a model's files themselves say: architecture, zeros, quantization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparse_exp.sparsity.measure import LayerSparsity, onnx_facts, overall, state_sparsity
from sparse_exp.sparsity.prune import BLOCK, blocks
from sparse_exp.sparsity.recipe import is_quantized
from sparse_exp.yolov5 import read_checkpoint

_NOT_PRUNABLE = ("model.0.", "model.24.")  # stem and head
_IN_BLOCKS_FROM = 0.99  # share of the zeros that lie in whole blocks; single ones may be so by chance


@dataclass(frozen=True)
class Measured:
    """What was found in a checkpoint.

    Attributes:
        size: n, s, m, l or x.
        names: of the classes.
        imgsz: side of the images it was trained on, in pixels; None where it does not say.
        sparsity: share of zeros in the prunable convolutions, 0..1.
        quantized: whether it went through quantization-aware training.
        block4: whether the zeros come in blocks of four input channels.
        ours: whether it is of this project's format.
        phase: of the training that it is of; "" where it does not say.
        recipe: that it went through; "" for none.
        metrics: that it brings along, by name.
    """

    size: str
    names: tuple[str, ...]
    imgsz: int | None
    sparsity: float
    quantized: bool
    block4: bool
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
    return Measured(
        checkpoint.size,
        checkpoint.names,
        checkpoint.imgsz,
        sparsity,
        is_quantized(list(checkpoint.state_dict)),
        _in_blocks(checkpoint.state_dict),
        checkpoint.format == "sparse_exp",
        checkpoint.phase or "",
        checkpoint.recipe,
        checkpoint.metrics,
    )


def onnx_sparsity(path: Path) -> float:
    """Share of zeros in the prunable convolutions of an ONNX file, 0..1.

    Of a file that another project exported the layers may have no telling names; then all count.
    """
    from dataclasses import replace

    from sparse_exp.sparsity.onnx_graph import layer_name

    named = [replace(layer, name=layer_name(layer.name)) for layer in onnx_facts(path).layers]
    return overall(_prunable(named))


def _prunable(layers: list[LayerSparsity]) -> list[LayerSparsity]:
    return [layer for layer in layers if not f"{layer.name}.".startswith(_NOT_PRUNABLE)]


def _in_blocks(state: dict[str, Tensor]) -> bool:
    zeros, whole = 0, 0
    for name, weight in state.items():
        if weight.ndim != 4 or name.startswith(_NOT_PRUNABLE) or not name.endswith(".weight"):
            continue
        groups = (weight == 0).flatten()[blocks(weight, BLOCK)]
        if groups.shape[1] == BLOCK:
            zeros += int(groups.sum())
            whole += BLOCK * int(groups.all(dim=1).sum())
    return zeros > 0 and whole >= _IN_BLOCKS_FROM * zeros
