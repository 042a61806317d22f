"""The detector's layers with quantizers in them, for quantization-aware training (QAT).

A layer keeps its place, name and parameters: `sparse_exp.quantization.quantizers.prepare` only gives it
another class and quantizers of its own. Switched off, it computes what it did before, and its quantizers are
not in the state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sparse_exp.distributed import collectives
from sparse_exp.quantization.fake_quantize import fake_quantize, fake_quantize_scaled
from sparse_exp.quantization.scheme import LayerScheme, TensorScheme
from sparse_exp.yolov5.model import Add

_EPS = torch.finfo(torch.float32).eps  # the least scale


class Quantizer(nn.Module):
    """Rounds a tensor to whole steps of a scale, whose range follows the values that it sees.

    It observes while it trains or is calibrated, never in evaluation. The range is an average of the minima
    and of the maxima of the batches: a moving one in training, over all batches in calibration. Several
    processes that train together observe the batch of all.

    Args:
        scheme: how it rounds.
        channels: of a weight that has a scale for each of them; otherwise 1.
        of_weight: of a weight, which is the same in all processes.

    Attributes:
        scheme: as given.
        enabled: whether it rounds.
        observing: whether its range follows the training.
        pinned: whether its range was set, and stays in calibration, too.
        readers: how many layers read the tensor through this quantizer. It is rounded once for all of them.
        scale: (channels,) size of a step.
        zero_point: (channels,) int32: the step that stands for 0.0.
        low: (channels,) start of the range. At first it is above `high`: nothing was seen yet.
        high: (channels,) end of the range.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, scheme: TensorScheme, channels: int = 1, *, of_weight: bool = False) -> None:
        super().__init__()
        self.scheme, self._of_weight, self.readers = scheme, of_weight, 1
        self.enabled = self.observing = self.pinned = False
        self._calibrated: int | None = None
        self._last: tuple[Tensor, Tensor, int] | None = None
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.int32))
        self.register_buffer("low", torch.zeros(channels))
        self.register_buffer("high", torch.full((channels,), -1.0))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape, a weight's (channels, ...); returned as it is while switched off."""
        if not self.enabled:
            return x
        if self._last is not None and self._last[0] is x:
            _, rounded, left = self._last
            self._last = (x, rounded, left - 1) if left > 1 else None
            return rounded
        if self._follows():
            self.observe(x.detach())
        rounded = fake_quantize(x, self.scale, self.zero_point, *self.scheme.steps)
        self._last = (x, rounded, self.readers - 1) if self.readers > 1 else None
        return rounded

    def round_scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """The weight, rounded after its filters are multiplied by factors (C,), and divided by them again."""
        if not self.enabled:
            return weight
        if self._follows():
            self.observe(weight.detach() * factor.detach().view(-1, 1, 1, 1))
        return fake_quantize_scaled(weight, factor, self.scale, self.zero_point, *self.scheme.steps)

    def _follows(self) -> bool:
        return not self.pinned and (self._calibrated is not None or (self.observing and self.training))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let the range follow a batch.

        Args:
            x: see `forward`; it may be empty where other processes have images.
        """
        low, high = self._extremes(x)
        if not bool((low <= high).all()):
            return
        seen = self.low <= self.high
        share = self._share_of_batch()
        self.low.copy_(torch.where(seen, self.low + share * (low - self.low), low))
        self.high.copy_(torch.where(seen, self.high + share * (high - self.high), high))
        self._set_scale()

    def set_range(self, low: float, high: float) -> None:
        """Set the range, which must hold 0.0, and let it stay."""
        self.low.fill_(low)
        self.high.fill_(high)
        self._set_scale()
        self.pinned = True

    def calibrate(self, *, on: bool) -> None:
        """Begin or end to observe in evaluation, each batch with the same weight."""
        self._calibrated = 0 if on else None

    def release(self) -> None:
        """Forget the tensor that other readers of this step wait for."""
        self._last = None

    def _share_of_batch(self) -> float:
        if self._calibrated is None:
            return self.scheme.averaging
        self._calibrated += 1
        return max(self.scheme.averaging, 1.0 / self._calibrated)

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum (channels,), of all processes' shares; infinities for an empty share of one."""
        x = _as_contiguous(x)
        if self.scheme.per_channel:
            rows = x.flatten(1)
            return rows.amin(1), rows.amax(1)  # ten times as fast as aminmax
        if self._of_weight:
            low, high = torch.aminmax(x)
            return low.view(1), high.view(1)
        if x.numel():
            low, high = (value.view(1) for value in torch.aminmax(x))
        else:
            low, high = x.new_full((1,), torch.inf), x.new_full((1,), -torch.inf)
        both = collectives.greatest(torch.cat([-low, high]))
        return -both[:1], both[1:]

    def _set_scale(self) -> None:
        """Scale and zero point of the range, widened to hold 0.0, by the formulas of torch's observers."""
        first, last = self.scheme.steps
        low, high = self.low.clamp(self.scheme.lowest, 0.0), self.high.clamp(min=0.0)
        if self.scheme.symmetric:
            scale = torch.maximum(-low, high) / (float(last - first) / 2)
        else:
            scale = (high - low) / float(last - first)
        self.scale.copy_(scale.clamp(min=_EPS))
        self.zero_point.copy_(self.zero_point_of(low, self.scale))

    def zero_point_of(self, low: Tensor, scale: Tensor) -> Tensor:
        """The step that stands for 0.0 in a range that begins at ``low``."""
        first, last = self.scheme.steps
        zero = first - torch.round(low.clamp(max=0.0) / scale).int()
        return torch.zeros_like(zero) if self.scheme.symmetric else zero.clamp(first, last)

    def __getstate__(self) -> dict[str, Any]:
        """All but the tensor that other readers of this step wait for; it belongs to a graph of gradients."""
        return {**self.__dict__, "_last": None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        if self.enabled:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        if self.enabled or f"{prefix}scale" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *arguments)


class QuantizedConv2d(nn.Conv2d):
    """A convolution that computes with rounded inputs and weights.

    A batch norm behind it is folded in: the weights that are rounded are those times gamma / sigma of the
    running statistics, which are those of the deployed layer. While the batch norm trains, the rounded
    weights are divided by the same factors, and the batch norm does its work. While it does not, it is only a
    bias.

    Attributes:
        scheme: what is quantized.
        input_quantizer: of the input; absent where that is left in floating point.
        weight_quantizer: of the weights; absent likewise.
        output_quantizer: of the output of a convolution without batch norm; absent likewise.
        norm: the batch norm, which is a module of its own; empty where there is none, or where weights are
            not rounded.
    """

    published: ClassVar[type[nn.Module]] = nn.Conv2d
    scheme: LayerScheme
    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    output_quantizer: Quantizer
    norm: tuple[QuantizedBatchNorm2d, ...]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        x = _rounded(self, "input_quantizer", x)
        weight, bias = self.weight, self.bias
        if self.norm and self.norm[0].folded:
            weight, bias = self._with_norm(self.norm[0])
        elif self.scheme.weights:
            weight = self.weight_quantizer(weight)
        return _rounded(self, "output_quantizer", self._conv_forward(x, weight, bias))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the layer and its batch norm as one convolution, not rounded."""
        bias = self.weight.new_zeros(self.out_channels) if self.bias is None else self.bias
        if not self.norm:
            return self.weight, bias
        norm = self.norm[0]
        factor = norm.factor()
        return self.weight * factor.view(-1, 1, 1, 1), norm.bias + (
            bias - cast(Tensor, norm.running_mean)
        ) * factor

    def _with_norm(self, norm: QuantizedBatchNorm2d) -> tuple[Tensor, Tensor | None]:
        if not norm.training:
            weight, bias = self.folded()
            return self.weight_quantizer(weight), bias
        return self.weight_quantizer.round_scaled(self.weight, norm.factor()), self.bias


class QuantizedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that can be frozen while the model trains, and which a convolution can fold in.

    Attributes:
        folded: whether the convolution before it, which is quantized, has applied it already in evaluation.
        frozen: whether it stays in evaluation mode in training, too.
        output_quantizer: of the output; absent where that is left in floating point.
    """

    published: ClassVar[type[nn.Module]] = nn.BatchNorm2d
    folded: bool
    frozen: bool
    output_quantizer: Quantizer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, C, H, W) to the same shape."""
        if self.training and collectives.size() > 1:
            x = collectives.batch_norm(self, x)
        elif self.training or not self.folded:
            x = super().forward(x)
        return _rounded(self, "output_quantizer", x)

    def train(self, mode: bool = True) -> QuantizedBatchNorm2d:  # noqa: FBT001, FBT002
        """Set the mode, but for frozen statistics, which stay in evaluation."""
        return super().train(mode and not self.frozen)

    def factor(self) -> Tensor:
        """(C,) gamma / sigma of the running statistics."""
        return self.weight / torch.sqrt(cast(Tensor, self.running_var) + self.eps)


class QuantizedAdd(Add):
    """A residual addition of rounded tensors.

    Attributes:
        scheme: what is quantized.
        input_quantizers: of the two inputs; absent where these are left in floating point.
        output_quantizer: of the sum; absent likewise.
    """

    published: ClassVar[type[nn.Module]] = Add
    scheme: LayerScheme
    input_quantizers: nn.ModuleList

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of two tensors of one shape."""
        if self.scheme.inputs:
            a, b = self.input_quantizers[0](a), self.input_quantizers[1](b)
        return _rounded(self, "output_quantizer", super().forward(a, b))


class _QuantizedUnary(nn.Module):
    """A module of one input, which is rounded, and one output, which may be."""

    scheme: LayerScheme

    def forward(self, x: Tensor) -> Tensor:
        """As of the published module."""
        x = super().forward(_rounded(self, "input_quantizer", x))
        return _rounded(self, "output_quantizer", x)


class QuantizedSiLU(_QuantizedUnary, nn.SiLU):
    """SiLU of a rounded tensor."""

    published: ClassVar[type[nn.Module]] = nn.SiLU


class QuantizedMaxPool2d(_QuantizedUnary, nn.MaxPool2d):
    """Max-pooling of a rounded tensor."""

    published: ClassVar[type[nn.Module]] = nn.MaxPool2d


class QuantizedUpsample(_QuantizedUnary, nn.Upsample):
    """A rounded tensor, upsampled."""

    published: ClassVar[type[nn.Module]] = nn.Upsample


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    kind.published: kind
    for kind in (QuantizedConv2d, QuantizedAdd, QuantizedSiLU, QuantizedMaxPool2d, QuantizedUpsample)
}
"""The class that a published module gets."""


def _rounded(module: nn.Module, name: str, x: Tensor) -> Tensor:
    quantizer = module._modules.get(name)
    return x if quantizer is None else cast(Tensor, quantizer(x))


def _as_contiguous(x: Tensor) -> Tensor:
    """Permute the axes of a channels_last tensor, which makes it contiguous without a copy; others stay."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x
