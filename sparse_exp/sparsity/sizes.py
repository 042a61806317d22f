"""Estimate the sizes of a run's files before they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sparse_exp.config.imgsz import Imgsz, sides
from sparse_exp.sparsity.measure import MEGABYTE

# Bits of a stored weight after gzip (level 6): the first number for a value that is not 0, the second times
# the entropy of the places of zeros. Fitted to the published weights of yolov5s, pruned layer-adaptively to
# 0..99 % zeros; right within 10 %. Weights compress because only the mantissas of fp32 are random, and small
# steps are by far the most frequent in int8.
_GZIP_FP32, _GZIP_INT8 = (30.0, 2.0), (5.5, 1.3)
_PER_TENSOR = 0.3e3  # bytes of a tensor's entry in a checkpoint, besides its values
_QAT_TENSORS = 16  # tensors that quantizers add to a convolution
_GRID = 24  # bytes of the decoding constants of one prediction: six floats
_NODES_FP32, _NODES_INT8 = 0.3e3, 2.2e3  # bytes of the graph's nodes around a convolution
_PREDICTIONS = 3 * (1 / 8**2 + 1 / 16**2 + 1 / 32**2)  # per pixel of the image


@dataclass(frozen=True)
class Sizes:
    """Estimated sizes in MB of 1e6 bytes.

    Attributes:
        checkpoint_mb: of the PyTorch checkpoint, which stores float32 in any case.
        onnx_mb: of ``model.onnx``.
        onnx_gzip_mb: of ``model.onnx`` after gzip.
    """

    checkpoint_mb: float
    onnx_mb: float
    onnx_gzip_mb: float


def estimate_sizes(
    model: nn.Module, sparsity: Mapping[str, float], *, quantized: bool, imgsz: Imgsz
) -> Sizes:
    """Estimate the sizes of a detector's files from counts alone.

    A stored weight takes 4 bytes (fp32) or 1 (int8), zero or not. In ONNX batch norms are folded into the
    convolutions, which leaves one float32 bias per channel. Compressed, a weight takes
    ``v (1 - s) + k H(s)`` bits, with the share s of zeros and its entropy
    ``H(s) = -s log2 s - (1 - s) log2 (1 - s)``: v = 30 and k = 2 for fp32, v = 5.5 and k = 1.3 for int8.

    Args:
        model: the detector, in floating point.
        sparsity: share of zeros that a convolution will have, 0..1, by name; 0 for those without an entry.
        quantized: whether weights are stored as int8.
        imgsz: size of the images.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    state = list(model.state_dict().values())
    tensors = len(state) + (_QAT_TENSORS * len(convs) if quantized else 0)
    checkpoint = 4 * sum(tensor.numel() for tensor in state) + _PER_TENSOR * tensors
    weights = sum(conv.weight.numel() for conv in convs.values())
    biases = 4 * sum(conv.out_channels for conv in convs.values())
    nodes = (_NODES_INT8 if quantized else _NODES_FP32) * len(convs)
    graph = _GRID * _PREDICTIONS * math.prod(sides(imgsz)) + nodes
    bits = _GZIP_INT8 if quantized else _GZIP_FP32
    compressed = sum(
        conv.weight.numel() * _gzip_bits(sparsity.get(name, 0.0), *bits) / 8 for name, conv in convs.items()
    )
    return Sizes(
        checkpoint / MEGABYTE,
        ((1 if quantized else 4) * weights + biases + graph) / MEGABYTE,
        (compressed + biases + graph / 10) / MEGABYTE,  # constants and nodes are repetitive
    )


def _gzip_bits(zeros: float, value: float, position: float) -> float:
    """Bits per weight after gzip in a layer with a share of zeros; see `_GZIP_FP32` for the other two."""
    entropy = -sum(share * math.log2(share) for share in (zeros, 1.0 - zeros) if share > 0.0)
    return value * (1.0 - zeros) + position * entropy
