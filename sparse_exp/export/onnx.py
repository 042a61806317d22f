"""Export of a detector to ONNX: images as uint8 in, decoded predictions out, any batch, one size."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_exp.files import landing
from sparse_exp.runs.metadata import describe, write_metadata
from sparse_exp.yolov5 import YOLOv5

INPUT, OUTPUT = "images", "predictions"


class _Pixels(nn.Module):
    """Reads uint8 images, as every engine is given them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        predictions: Tensor = self.model(images.float() * (1.0 / 255.0))
        return predictions


def export_float(
    model: YOLOv5, destination: Path, *, imgsz: int, opset: int, names: Sequence[str] = ()
) -> None:
    """Export a model that is not quantized.

    Args:
        model: the detector; left as it was.
        destination: ONNX file: uint8 images (N, 3, imgsz, imgsz) to float32 (N, A, 5 + nc).
        imgsz: side of the images in pixels.
        opset: ONNX operator set.
        names: of the classes, which the file then says; see `sparse_exp.runs.metadata`.
    """
    pixels = torch.zeros(1, 3, imgsz, imgsz, dtype=torch.uint8)
    with model.export_mode(imgsz), landing(destination) as temporary:
        _write(_Pixels(model), pixels, temporary, opset)
        write_metadata(temporary, describe(names, imgsz))


def export_quantized(
    model: YOLOv5, integer: Path, qdq: Path, *, imgsz: int, opset: int, names: Sequence[str] = ()
) -> None:
    """Export a QAT model twice: with integer convolutions, and with quantize-dequantize pairs.

    Args:
        model: the detector after QAT, its observers frozen and its input quantizer pinned.
        integer: file for DeepSparse (ConvInteger).
        qdq: file for ONNX Runtime, OpenVINO and others.
        imgsz: side of the images in pixels.
        opset: ONNX operator set, at least 13.
        names: as of `export_float`.
    """
    from sparse_exp.export.quantized import store_integers, to_integer_graph, unsign_activations

    pixels = torch.zeros(1, 3, imgsz, imgsz, dtype=torch.uint8)
    with model.export_mode(imgsz), landing(qdq) as pairs, landing(integer) as integers:
        _write(_Pixels(model), pixels, pairs, opset)
        unsign_activations(pairs)
        store_integers(pairs)
        _write(model, pixels.float(), integers, opset)
        to_integer_graph(integers, integers)
        for file in (pairs, integers):
            write_metadata(file, describe(names, imgsz))


def _write(module: nn.Module, sample: Tensor, destination: Path, opset: int) -> None:
    module.eval()
    with warnings.catch_warnings(), torch.no_grad():
        # The TorchScript exporter is deprecated, but SparseML knows its graphs.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (sample,),
            str(destination),
            dynamo=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )
