"""Export of a detector to ONNX: images as uint8 in, decoded predictions out, any batch, one size."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from sparse_exp.config.imgsz import Imgsz, sides
from sparse_exp.export.integer import to_integer_graph
from sparse_exp.export.outputs import Images, quantize_outputs
from sparse_exp.export.pairs import keep_inputs, tidy
from sparse_exp.files import landing
from sparse_exp.quantization.modules import QuantizedConv2d
from sparse_exp.runs.metadata import describe
from sparse_exp.yolov5 import YOLOv5

INPUT, OUTPUT = "images", "predictions"
_IR_VERSION = 8  # of the file format; DeepSparse's onnx 1.14 reads 9 at most, and opset 13 needs 7


@dataclass(frozen=True)
class FileForm:
    """How an ONNX file is written, and what it says of itself.

    Attributes:
        imgsz: size of the images.
        opset: ONNX operator set; at least 13 for a quantized model.
        names: of the classes.
        facts: further entries of the file; see `sparse_exp.runs.metadata`.
    """

    imgsz: Imgsz
    opset: int
    names: Sequence[str] = ()
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def entries(self) -> dict[str, str]:
        """The file's metadata."""
        return describe(self.names, self.imgsz, self.facts)


class _Pixels(nn.Module):
    """Reads uint8 images, as every engine is given them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        predictions: Tensor = self.model(images.float() * (1.0 / 255.0))
        return predictions


def export_float(model: YOLOv5, destination: Path, form: FileForm) -> None:
    """Export a model that is not quantized.

    Args:
        model: the detector; left as it was.
        destination: ONNX file: uint8 images (N, 3, H, W) to float32 (N, A, 5 + nc).
        form: of the file.
    """
    with landing(destination) as temporary:
        _save(_trace(model, form), temporary)


def trace_quantized(model: YOLOv5, form: FileForm) -> ModelProto:
    """The graph of a quantized model, from which the file of each engine is made.

    Args:
        model: the detector after QAT, its observers frozen and its input quantizer pinned; left as it was.
        form: of the files.

    Returns:
        It, in the form that `sparse_exp.export.pairs` describes.
    """
    traced = _trace(_with_rounded_weights(model), form)
    tidy(traced.graph)
    return traced


def export_qdq(traced: ModelProto, destination: Path) -> None:
    """Write a quantized model for OpenVINO and others, with quantize-dequantize pairs.

    Args:
        traced: of `trace_quantized`; left as it was.
        destination: ONNX file.
    """
    with landing(destination) as temporary:
        exported = copy.deepcopy(traced)
        keep_inputs(exported.graph)
        _save(exported, temporary)


def export_integer(traced: ModelProto, destination: Path) -> None:
    """Write a quantized model for DeepSparse, with integer convolutions (ConvInteger).

    Args:
        traced: as of `export_qdq`.
        destination: ONNX file.
    """
    with landing(destination) as temporary:
        exported = copy.deepcopy(traced)
        keep_inputs(exported.graph)
        to_integer_graph(exported.graph)
        _save(exported, temporary)


def export_onnxruntime(traced: ModelProto, destination: Path, images: Images) -> None:
    """Write a quantized model for ONNX Runtime; see `sparse_exp.export.outputs`.

    Args:
        traced: as of `export_qdq`.
        destination: ONNX file.
        images: batches, uint8 (N, 3, H, W), to find the ranges with that were not trained.
    """
    with landing(destination) as temporary:
        exported = copy.deepcopy(traced)
        quantize_outputs(exported, images)
        _save(exported, temporary)


@torch.no_grad()
def _with_rounded_weights(model: YOLOv5) -> YOLOv5:
    """A copy whose weights are those that it computes with: batch norms folded in, and rounded.

    Rounding them again in 8 bits changes nothing, and PyTorch exports no range of fewer bits.
    """
    model = copy.deepcopy(model)
    for conv in model.modules():
        if isinstance(conv, QuantizedConv2d) and conv.scheme.weights:
            weight, bias = conv.folded()
            conv.weight, conv.bias = nn.Parameter(conv.weight_quantizer(weight)), nn.Parameter(bias)
            conv.norm = ()
            conv.weight_quantizer.scheme = replace(conv.scheme.weights, num_bits=8)
    return model


def _trace(model: YOLOv5, form: FileForm) -> ModelProto:
    """The graph of a model, with any batch and sizes that are numbers, and the metadata of its file."""
    pixels = torch.zeros(1, 3, *sides(form.imgsz), dtype=torch.uint8)
    with (
        model.export_mode(form.imgsz),
        warnings.catch_warnings(),
        torch.no_grad(),
        tempfile.TemporaryDirectory() as folder,
    ):
        file = Path(folder) / "traced.onnx"
        # The TorchScript exporter is deprecated. The other (dynamo=True, run with torch 2.14.1 and onnxscript
        # 0.7.2) does not export these models: fake_quantize_per_tensor_affine has no kernel for its fake
        # tensors; it writes no operator set below 18, takes 10 s instead of 1.3 s for a yolov5n in fp32, and
        # forgets the names of the modules, by which the zeros of a layer are checked.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Pixels(model).eval(),
            (pixels,),
            file,
            dynamo=False,
            opset_version=form.opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )
        exported, sizes = onnx.load(str(file)), model(pixels.float()).shape[1:]
    for dimension, size in zip(exported.graph.output[0].type.tensor_type.shape.dim[1:], sizes, strict=True):
        dimension.dim_value = size
    exported.ir_version = _IR_VERSION
    onnx.helper.set_model_props(exported, form.entries)
    return exported


def _save(model: ModelProto, destination: Path) -> None:
    onnx.checker.check_model(model)
    onnx.save(model, str(destination))
