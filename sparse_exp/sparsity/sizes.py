"""How large the files of a run will be, estimated before there are any."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sparse_exp.sparsity.measure import MEGABYTE

# What gzip (level 6) leaves of a stored weight, in bits: so much for a value that is not 0, and so
# many times the entropy of where the zeros are. Fitted to the published weights of yolov5s, pruned
# layer-adaptively to 0..99 % zeros, within 10 %; of fp32 only the mantissas are random, of int8 the
# small steps are by far the most frequent.
_GZIP_FP32, _GZIP_INT8 = (30.0, 2.0), (5.5, 1.3)
_PER_TENSOR = 0.3e3  # bytes of a checkpoint beyond each tensor's values: its entry in the archive
_QAT_TENSORS = 16  # that the observers of a quantized convolution add
_GRID = 24  # bytes of the decoding constants for one prediction: six floats
_NODES_FP32, _NODES_INT8 = 0.3e3, 2.2e3  # bytes of the graph around a convolution
_PREDICTIONS = 3 * (1 / 8**2 + 1 / 16**2 + 1 / 32**2)  # of a YOLOv5 for each pixel


@dataclass(frozen=True)
class Sizes:
    """Estimated sizes in MB of 1e6 bytes.

    Attributes:
        checkpoint_mb: the PyTorch checkpoint, float32 whatever it holds.
        onnx_mb: ``model.onnx``.
        onnx_gzip_mb: the same compressed with gzip.
    """

    checkpoint_mb: float
    onnx_mb: float
    onnx_gzip_mb: float


def estimate_sizes(model: nn.Module, sparsity: Mapping[str, float], *, quantized: bool, imgsz: int) -> Sizes:
    """Estimate the files of a detector from counts alone.

    A stored weight takes 4 bytes (fp32) or 1 (int8), zero or not; batch norms are folded away in
    ONNX, one float32 bias a channel stays. Compressed, a weight takes ``v (1 - s) + k H(s)`` bits for
    the share s of zeros and its entropy ``H(s) = -s log2 s - (1 - s) log2 (1 - s)``: v = 30 and k = 2
    for fp32, v = 5.5 and k = 1.3 for int8.

    Args:
        model: the detector, in floating point.
        sparsity: share of zeros that a convolution will have, 0..1, by its name; 0 for others.
        quantized: whether weights are stored as int8.
        imgsz: side of the images in pixels.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    state = list(model.state_dict().values())
    tensors = len(state) + (_QAT_TENSORS * len(convs) if quantized else 0)
    checkpoint = 4 * sum(tensor.numel() for tensor in state) + _PER_TENSOR * tensors
    weights = sum(conv.weight.numel() for conv in convs.values())
    biases = 4 * sum(conv.out_channels for conv in convs.values())
    graph = _GRID * _PREDICTIONS * imgsz**2 + (_NODES_INT8 if quantized else _NODES_FP32) * len(convs)
    bits = _GZIP_INT8 if quantized else _GZIP_FP32
    compressed = sum(
        conv.weight.numel() * _gzip_bits(sparsity.get(name, 0.0), *bits) / 8 for name, conv in convs.items()
    )
    return Sizes(
        checkpoint / MEGABYTE,
        ((1 if quantized else 4) * weights + biases + graph) / MEGABYTE,
        (compressed + biases + graph / 10) / MEGABYTE,  # constants and nodes repeat themselves
    )


def _gzip_bits(zeros: float, value: float, position: float) -> float:
    """Bits that gzip leaves of one weight of a layer with the given share of zeros."""
    entropy = -sum(share * math.log2(share) for share in (zeros, 1.0 - zeros) if share > 0.0)
    return value * (1.0 - zeros) + position * entropy
