"""Rounding to whole steps within a range: the values and gradients of torch's operators, from cheaper ones.

On a CPU ``torch.fake_quantize_per_tensor_affine`` (version 2.14) works element by element; the same values
come from four vectorized operations, about six times as fast. While a model is exported, and on other
devices, torch's own operators run.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, first: int, last: int) -> Tensor:
    """Round a tensor to steps of a scale.

    Args:
        x: of any shape.
        scale: (1,), or one of each index of ``x``'s first axis.
        zero_point: int32, of the scale's shape: the step that stands for 0.0.
        first: the first step.
        last: the last step.

    Returns:
        As ``torch.fake_quantize_per_{tensor,channel}_affine``: ``scale * (clamp(round(x / scale) +
        zero_point) - zero_point)``. The gradient passes where nothing was clamped.
    """
    if _by_torch(x):
        if scale.numel() == 1:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, first, last)
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, first, last)
    if scale.numel() == 1:
        zero = int(zero_point)
        return cast(Tensor, _PerTensor.apply(x, float(scale), first - zero, last - zero))
    if zero_point.any():  # no scheme of ours that people use
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, first, last)
    return cast(Tensor, _PerChannel.apply(x, scale.view(-1, *(1,) * (x.ndim - 1)), first, last))


def fake_quantize_scaled(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, first: int, last: int
) -> Tensor:
    """Round a weight after each of its filters is multiplied by a factor, and divide it by that factor again.

    Args:
        weight: (C, ...).
        factor: (C,); a filter whose factor is 0 becomes 0.
        scale: of the multiplied weight, see `fake_quantize`.
        zero_point: likewise.
        first: the first step.
        last: the last step.
    """
    factor, scales = (values.view(-1, *(1,) * (weight.ndim - 1)) for values in (factor, scale))
    if _by_torch(weight) or zero_point.any():
        rounded = fake_quantize(weight * factor, scale, zero_point, first, last)
        return rounded / torch.where(factor == 0, 1.0, factor)
    return cast(Tensor, _Scaled.apply(weight, factor, scales, first, last))


def _by_torch(x: Tensor) -> bool:
    return is_exporting() or x.dtype != torch.float32 or not x.is_cpu


def is_exporting() -> bool:
    """Whether a graph is being made of what is computed, which must show torch's own operators."""
    return torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()


class _PerTensor(torch.autograd.Function):
    """Round to steps of ``scale`` and clamp; the gradient passes where nothing was clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        """``x`` of any shape; ``low`` and ``high`` are the first and the last step, counted from 0.0."""
        # Keeping the input is cheaper than computing a mask, and often two readers share the input.
        ctx.save_for_backward(x)
        ctx.open_interval = (-_first_above(-low, scale), _first_above(high, scale))
        return (x * (1.0 / scale)).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient, and 0 where a value was clamped."""
        (x,) = ctx.saved_tensors
        gradient: Any = torch.ops.aten.hardtanh_backward(*gradients, x, *ctx.open_interval)
        return gradient, None, None, None


class _PerChannel(torch.autograd.Function):
    """The same with a scale for each channel, shaped so that it meets ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        """``x`` (C, ...); ``scale`` (C, 1, ...)."""
        in_steps = x * (1.0 / scale)
        ctx.save_for_backward(in_steps)
        ctx.open_interval = (-_first_above(-low, 1.0), _first_above(high, 1.0))
        return in_steps.round().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient, and 0 where a value was clamped."""
        (in_steps,) = ctx.saved_tensors
        gradient: Any = torch.ops.aten.hardtanh_backward(*gradients, in_steps, *ctx.open_interval)
        return gradient, None, None, None


class _Scaled(torch.autograd.Function):
    """Multiply, round and divide in one, so that in the gradient of the weight the factor cancels out."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        """``weight`` (C, ...); ``factor`` (C, 1, ...); ``scale`` of the same shape, or of one element."""
        divisor = torch.where(factor == 0, 1.0, factor)
        in_steps = (weight * factor).mul_(1.0 / scale)
        rounded = in_steps.round().clamp_(low, high).mul_(scale).div_(divisor)
        ctx.save_for_backward(weight, factor, in_steps, rounded)
        ctx.open_interval = (-_first_above(-low, 1.0), _first_above(high, 1.0))
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """The gradient of the weight, 0 where a value was clamped, and that of the factor."""
        weight, factor, in_steps, rounded = ctx.saved_tensors
        passed: Any = torch.ops.aten.hardtanh_backward(*gradients, in_steps, *ctx.open_interval)
        dead = factor == 0
        of_factor = _dot(passed, weight) - _dot(gradients[0], rounded)
        of_factor = of_factor.view_as(factor) / torch.where(dead, 1.0, factor)
        return passed.mul_(~dead) if dead.any() else passed, of_factor, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(C,) the products of two tensors (C, ...), summed for each channel."""
    order = (0, *range(2, a.ndim), 1)  # makes channels_last contiguous, without a copy
    rows = [x.permute(order).reshape(len(x), 1, -1) for x in (a, b)]
    return torch.bmm(rows[0], rows[1].transpose(1, 2)).view(-1)


def _first_above(step: int, scale: float) -> float:
    """The smallest float32 that rounds to more than ``step`` steps of ``scale``.

    It lies a few float32 numbers around ``(step + 0.5) * scale``; which one it is follows from the
    multiplication and the rounding (half to even) of the forward pass.
    """
    per_unit, infinity = np.float32(1.0 / scale), np.float32(np.inf)
    value = np.float32((step + 0.5) * scale)
    while np.rint(value * per_unit) > step:
        value = np.nextafter(value, -infinity)
    while np.rint(value * per_unit) <= step:
        value = np.nextafter(value, infinity)
    return float(value)
