"""The torch model that deployed files are held against: a quantized one computes on whole numbers.

Fake quantization computes in floating point with numbers that stand for integers. Its sums are rounded in
an order that depends on the memory layout, and its biases are not rounded at all, where the integer graph
stores them as int32. Both are tiny, but decide where a value near a tie is rounded to, and one step in an
early layer moves many behind it: of one yolov5s checkpoint two layouts differ by 0.3 px and 0.003 in
scores, which on 403 boxes moves mAP50 by 0.005 (standard deviation), up or down.

Here sums are exact and biases whole. DeepSparse's integer graph then computes the same to the last step
(measured: 0.00 px on two of four checkpoints) until somewhere a value lies so near to a tie that the last
bit of a SiLU or of an addition decides; from there on the steps spread as before (0.08 and 0.22 px).
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from sparse_exp.quantization.modules import QuantizedConv2d
from sparse_exp.quantization.quantizers import quantizers
from sparse_exp.yolov5 import YOLOv5

_EXACT_IN_FLOAT32 = 2**24  # whole numbers up to here, and so their sums in any order


class IntegerConv(nn.Module):
    """A quantized convolution as an integer graph computes it: int8 steps in, int32 sums, one scale.

    Whole numbers are held as floating point, wide enough that no sum is rounded.

    Args:
        conv: quantized convolution, its ranges frozen, with its batch norm where it has one.
    """

    weight: Tensor
    bias: Tensor
    step: Tensor
    scale: Tensor
    zero: Tensor

    @torch.no_grad()
    def __init__(self, conv: QuantizedConv2d) -> None:
        super().__init__()
        self._stride, self._padding = conv.stride, conv.padding
        quantizer = conv.input_quantizer
        self._low, self._high = quantizer.scheme.steps
        weight, bias = conv.folded()
        steps = torch.round(conv.weight_quantizer(weight) / conv.weight_quantizer.scale.reshape(-1, 1, 1, 1))
        step = _step(conv)
        offsets = torch.round(bias.double() / step.double())
        largest = steps.abs().sum((1, 2, 3)) * (self._high - self._low) + offsets.abs()
        dtype = torch.float32 if float(largest.max()) < _EXACT_IN_FLOAT32 else torch.float64
        values = {"weight": steps.to(dtype), "bias": offsets.to(dtype), "step": step.reshape(1, -1, 1, 1)}
        values |= {"scale": quantizer.scale.clone(), "zero": quantizer.zero_point.float()}
        for name, value in values.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` float32 (N, c_in, H, W) to float32 (N, c_out, H / stride, W / stride)."""
        q = torch.round(x / self.scale).add_(self.zero).clamp_(self._low, self._high).sub_(self.zero)
        sums = conv2d(q.to(self.weight.dtype), self.weight, self.bias, self._stride, self._padding)
        return sums.float() * self.step


@torch.no_grad()
def as_deployed(model: YOLOv5) -> YOLOv5:
    """The model as `evaluate` and `verify` measure it.

    Args:
        model: in evaluation mode, its quantizers frozen; left as it is.

    Returns:
        A copy whose quantized convolutions compute on whole numbers; the model itself if it has none.
    """
    if not _integer_convolutions(model):
        return model
    model = with_whole_biases(model)
    for name, conv in _integer_convolutions(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, IntegerConv(conv))
    for quantizer in quantizers(model).values():
        quantizer.readers = 1  # these convolutions round their inputs themselves
    return model


@torch.no_grad()
def with_whole_biases(model: YOLOv5) -> YOLOv5:
    """The model with biases that int32 can hold in steps of input scale times weight scale.

    The integer graph has no others. With these every exported file is the same network, whether its biases
    are stored as integers or as floating point.

    Args:
        model: in evaluation mode, its quantizers frozen; left as it is.

    Returns:
        A copy; the model itself if it has no quantized convolution.
    """
    if not _integer_convolutions(model):
        return model
    model = copy.deepcopy(model)
    for conv in _integer_convolutions(model).values():
        bias, step = conv.folded()[1].double(), _step(conv).double()
        changed = cast(Tensor, conv.norm[0].bias if conv.norm else conv.bias)
        changed.add_((torch.round(bias / step) * step - bias).float())
    return model


def _integer_convolutions(model: nn.Module) -> dict[str, QuantizedConv2d]:
    """The convolutions that an integer graph can compute: with rounded inputs and weights."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedConv2d)
        and module.scheme.inputs
        and module.scheme.weights
        and module.weight_quantizer.enabled
    }


def _step(conv: QuantizedConv2d) -> Tensor:
    """What 1 means in the integer sums, (1,) or of each output channel: input scale times weight scale."""
    return conv.input_quantizer.scale * conv.weight_quantizer.scale
