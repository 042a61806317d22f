"""The torch model that deployed files are held against: a quantized one computes on whole numbers.

Fake quantization computes in floating point with numbers that stand for integers. Its sums are rounded in
an order that depends on the memory layout, and its biases are not rounded at all, where the integer graph
stores them as int32. Both are tiny, but decide where a value near a tie is rounded to, and one step in an
early layer moves many behind it: two layouts of one checkpoint differ by 0.3 px and 0.003 in scores, on
403 boxes by 0.004 (standard deviation) in mAP50. Here sums are exact and biases whole, so that what remains
of the difference to an engine is the engine's own (docs/architecture.md, "Rounding").
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import QuantWrapper
from torch.nn.functional import conv2d

from sparse_exp.sparsity.recipe import is_quantized
from sparse_exp.yolov5 import YOLOv5

_EXACT_IN_FLOAT32 = 2**24  # whole numbers up to here, and so their sums in any order


class IntegerConv(nn.Module):
    """A quantized convolution as an integer graph computes it: int8 steps in, int32 sums, one scale.

    Whole numbers are held as floating point, wide enough that no sum is rounded.

    Args:
        quantizer: of the input, its range frozen.
        conv: fake-quantized convolution, with its batch norm where it has one.
    """

    weight: Tensor
    bias: Tensor
    step: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, quantizer: Any, conv: Any) -> None:
        super().__init__()
        self._stride, self._padding = conv.stride, conv.padding
        self._low, self._high = quantizer.quant_min, quantizer.quant_max
        weight, bias = folded(conv)
        scale = conv.weight_fake_quant.scale
        step = quantizer.scale * scale
        steps = torch.round(conv.weight_fake_quant(weight) / scale)
        offsets = torch.round(bias.double() / step.double())
        largest = steps.abs().sum((1, 2, 3)) * (self._high - self._low) + offsets.abs()
        dtype = torch.float32 if float(largest.max()) < _EXACT_IN_FLOAT32 else torch.float64
        values = {"weight": steps.to(dtype), "bias": offsets.to(dtype), "step": step}
        values |= {"scale": quantizer.scale.clone(), "zero": quantizer.zero_point.float()}
        for name, value in values.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` float32 (N, c_in, H, W) to float32 (N, c_out, H / stride, W / stride)."""
        q = torch.round(x / self.scale).add_(self.zero).clamp_(self._low, self._high).sub_(self.zero)
        sums = conv2d(q.to(self.weight.dtype), self.weight, self.bias, self._stride, self._padding)
        return sums.float() * self.step


@torch.no_grad()
def folded(conv: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a fake-quantized convolution with its batch norm folded in, not yet rounded."""
    norm = getattr(conv, "bn", None)
    if norm is None:
        return conv.weight, conv.bias
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return conv.weight * factor.reshape(-1, 1, 1, 1), norm.bias - norm.running_mean * factor


@torch.no_grad()
def as_deployed(model: YOLOv5) -> YOLOv5:
    """The model as `evaluate` and `verify` measure it.

    Args:
        model: in evaluation mode, its quantizers frozen; left as it is.

    Returns:
        A copy whose convolutions compute on whole numbers; a model that is not quantized itself.
    """
    if not is_quantized(list(model.state_dict())):
        return model
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantWrapper):
                quantizer = child.quant.activation_post_process
                setattr(parent, name, IntegerConv(quantizer, child.module))
    return model
