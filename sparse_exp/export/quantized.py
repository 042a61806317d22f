"""The second door to SparseML: from a QDQ graph to the integer graph that DeepSparse runs."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # sparseml 1.8 imports pkg_resources, which warns
    from sparseml.exporters.onnx_to_deepsparse import ONNXToDeepsparse

logging.getLogger("sparseml").setLevel(logging.WARNING)  # it reports every transformation


def to_integer_graph(qdq: Path, destination: Path) -> None:
    """Convert a quantize-dequantize graph with floating-point input to integer convolutions.

    The quantize node at the input goes away, and the graph then reads uint8 images: this is exact when
    the input's scale is 1/255 and its zero point 0 (see `sparse_exp.sparsity.recipe.pin_input_quantizer`).

    Args:
        qdq: ONNX file with fake quantization exported as QuantizeLinear and DequantizeLinear.
        destination: file to write.
    """
    exporter = ONNXToDeepsparse(skip_input_quantize=True, inplace=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx.save(exporter.apply(onnx.load(str(qdq))), str(destination))
