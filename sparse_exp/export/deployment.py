"""The deployment directory of a trained detector."""

from __future__ import annotations

from pathlib import Path

import torch

from sparse_exp.export.onnx import export_float, export_quantized
from sparse_exp.export.reference import with_whole_biases
from sparse_exp.progress import progress
from sparse_exp.sparsity.recipe import is_quantized
from sparse_exp.yolov5 import YOLOv5

MODEL, QDQ, DENSE = "model.onnx", "model.qdq.onnx", "dense.onnx"


def export_deployment(model: YOLOv5, folder: Path, *, imgsz: int, opset: int) -> list[Path]:
    """Write ``model.onnx``, for a quantized model ``model.qdq.onnx``, and ``dense.onnx``.

    ``dense.onnx`` is the fp32 baseline of the same architecture and classes. Its weights are initial
    ones: speed and size do not depend on their values, and no accuracy is claimed for it.

    Args:
        model: the trained detector in evaluation mode, its quantizers frozen.
        folder: where to write.
        imgsz: side of the images in pixels.
        opset: ONNX operator set.

    Returns:
        The files.
    """
    torch.manual_seed(0)
    baseline = YOLOv5(model.size, model.num_classes).eval()
    quantized = is_quantized(list(model.state_dict()))
    with progress("Exporting", total=2 + quantized, unit="files") as bar:
        export_float(baseline, folder / DENSE, imgsz=imgsz, opset=opset)
        bar.advance()
        if quantized:
            whole = with_whole_biases(model)
            export_quantized(whole, folder / MODEL, folder / QDQ, imgsz=imgsz, opset=opset)
        else:
            export_float(model, folder / MODEL, imgsz=imgsz, opset=opset)
        bar.advance(1 + quantized)
    return [folder / DENSE, folder / MODEL, *([folder / QDQ] if quantized else [])]
