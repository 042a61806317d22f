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
    if is_exporting() or x.dtype != torch.float32 or not x.is_cpu:
        if scale.numel() == 1:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, first, last)
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, first, last)
    if scale.numel() == 1:
        zero = int(zero_point)
        return cast(Tensor, _PerTensor.apply(x, float(scale), first - zero, last - zero))
    if zero_point.any():  # no scheme of ours that people use
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, first, last)
    return cast(Tensor, _PerChannel.apply(x, scale.view(-1, *(1,) * (x.ndim - 1)), first, last))


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
