"""Grow a detector: make a larger size that computes (nearly) the same as a smaller one.

This is Net2Net (Chen, Goodfellow and Shlens 2016, https://arxiv.org/abs/1511.05641) for YOLOv5 v6/v7. A size
without a checkpoint can thus start from what a smaller size has learned.

*Wider.* Each new channel copies an old one. A convolution that reads a channel with copies must share its
weight among the copies. Any shares give the same sum; here the first copy gets the whole weight. All copies
but the first compute their channel from a tenth of the incoming weights, and their batch norm makes up for
it, which is exact too. A grown start is pruned next, by magnitude, and pruning then takes the later copies of
a weight before the first. With equal shares, from s to l, each old weight would become four small equal ones,
of which pruning takes most.

Measured on yolov5s (COCO) grown to l, pruned to 90 %, its batch norms fitted again. The numbers are relative
errors of the maps that the head reads (17, 20, 23):

- equal shares: 0.70, 0.83, 0.92
- the whole weight to a random copy for each pair of channels: 0.47, 0.59, 0.68
- the whole weight to the first copy, as here: 0.22, 0.28, 0.33
- for comparison s itself, pruned to 40 %: 0.18, 0.23, 0.29; pruned to 75 %: 0.54, 0.67, 0.75

*Deeper.* A new bottleneck of the backbone has a shortcut, and at first adds nothing to it, in training mode
either: the scale of its last batch norm is nearly 0, and learns from there. Its convolutions are random and
sparse, so that pruning leaves most of the weights to the old layers. Bottlenecks of the neck have no
shortcut. A new one passes each channel on through SiLU, shifted to where SiLU is nearly straight; the
convolution behind it reverses the remaining slope and shift. Both are computed from the batch norm before,
whose outputs are assumed to be normally distributed. The maps that the head reads change by less than 1 %.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from sparse_exp.errors import CheckpointError, expected
from sparse_exp.yolov5.checkpoint import Checkpoint, transfer_weights
from sparse_exp.yolov5.model import (
    C3,
    HEAD_INPUTS,
    JOINED_WITH,
    SCALES,
    SPPF,
    Bottleneck,
    Concat,
    Conv,
    YOLOv5,
)

_ORDER = tuple(SCALES)
# Scale of a new residual branch. QAT divides by it, so that 0 would give NaN; with this value the branch adds
# less than float32 resolves.
_SILENT = 1e-8
# Shift of SiLU's input. With a larger one SiLU is straighter (8: 0.15 %), but fewer of QAT's 256 steps are
# left for the values.
_SHIFT = 6.0
_FAINT = 0.1  # incoming weights of later copies, as a share of those of the first copy
_DENSITY = 0.05  # of a new residual branch: a dense one would keep many of the weights that pruning leaves
_POINTS = 64  # of the quadrature over a normal distribution


@torch.no_grad()
def grow(checkpoint: Checkpoint, size: str, *, seed: int = 0, noise: float = 1e-3) -> Checkpoint:
    """Make a larger detector from a smaller one.

    Args:
        checkpoint: of size n, s, m or l, in floating point; not changed. Its zeros are not kept: they are
            among the smallest weights of the result, which is dense.
        size: of the result, larger than the checkpoint's.
        seed: of all randomness.
        noise: standard deviation of the noise that is added to the weights of every convolution but the
            head's, as a share of their root mean square. It makes copies differ, and moves weights away from
            0, where a recipe would hold them.

    Returns:
        A checkpoint for the same classes: float32 tensors of the new size by their published names. It has no
        metrics and no recipe, because those of the smaller one do not hold for it.

    Raises:
        CheckpointError: ``size`` is not larger, or the checkpoint is slimmed or quantized or lacks a tensor.
    """
    larger = _ORDER[_ORDER.index(checkpoint.size) + 1 :]
    if size not in larger:
        should_be = f"larger than {checkpoint.size} ({', '.join(larger) or 'there is none'})"
        do = "Name smaller sizes in model.grow_from."
        raise CheckpointError(expected("the size that a checkpoint is grown to", should_be, size, do))
    if checkpoint.widths:
        do = "Name checkpoints of stock widths in model.grow_from."
        raise CheckpointError(expected("a checkpoint to grow", "of the stock widths", "slimmed", do))
    with torch.random.fork_rng(devices=[]):
        small, large = (YOLOv5(s, checkpoint.num_classes) for s in (checkpoint.size, size))
    transfer_weights(small, checkpoint)
    growth = _Growth(torch.Generator().manual_seed(seed))
    growth.detector(small, large)
    growth.add_noise(large, noise)
    state, phase = dict(large.state_dict()), checkpoint.phase and "dense"
    return replace(checkpoint, size=size, state_dict=state, recipe="", phase=phase, metrics={})


@dataclass(frozen=True)
class _Growth:
    """Fills the modules of a larger detector from those of a smaller one.

    A *map* holds, for each new channel, the index of the old channel that it copies: int64 (new channels,).
    The methods take the map of a module's inputs and return the map of its outputs.
    """

    random: torch.Generator

    def detector(self, small: YOLOv5, large: YOLOv5) -> None:
        x, kept = torch.arange(3), dict[int, Tensor]()
        for index, (old, new) in enumerate(zip(small.model[:-1], large.model[:-1], strict=True)):
            if isinstance(new, Concat):
                x = _joined(x, kept[JOINED_WITH[index]])
            elif isinstance(new, Conv):
                x = self.conv(cast(Conv, old), new, x)
            elif isinstance(new, C3):
                x = self.c3(cast(C3, old), new, x)
            elif isinstance(new, SPPF):
                x = self.sppf(cast(SPPF, old), new, x)
            kept[index] = x
        large.head.anchors.copy_(small.head.anchors)
        for ours, theirs, index in zip(small.head.m, large.head.m, HEAD_INPUTS, strict=True):
            _widen(cast(nn.Conv2d, ours), cast(nn.Conv2d, theirs), kept[index])
            cast(Tensor, theirs.bias).copy_(cast(Tensor, ours.bias))

    def c3(self, old: C3, new: C3, x: Tensor) -> Tensor:
        trunk, side = self.conv(old.cv1, new.cv1, x), self.conv(old.cv2, new.cv2, x)
        for ours, theirs in zip(old.m, new.m, strict=False):
            self.bottleneck(cast(Bottleneck, ours), cast(Bottleneck, theirs), trunk)
        out = self.conv(old.cv3, new.cv3, _joined(trunk, side))
        bottlenecks = [cast(Bottleneck, b) for b in new.m]
        if bottlenecks[0].shortcut:
            self.silence(bottlenecks[len(old.m) :])
        else:
            _make_identity(bottlenecks[len(old.m) - 1], bottlenecks[len(old.m) :], new.cv3)
        return out

    def sppf(self, old: SPPF, new: SPPF, x: Tensor) -> Tensor:
        pooled = self.conv(old.cv1, new.cv1, x)
        return self.conv(old.cv2, new.cv2, _joined(*[pooled] * 4))

    def conv(self, old: Conv, new: Conv, x: Tensor, out: Tensor | None = None) -> Tensor:
        out = self.copies(old.conv.out_channels, new.conv.out_channels) if out is None else out
        _widen(old.conv, new.conv, x, out)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(new.bn, name).copy_(getattr(old.bn, name)[out])
        _make_faint(new, _firsts(out))
        return out

    def bottleneck(self, old: Bottleneck, new: Bottleneck, trunk: Tensor) -> None:
        """Fill a bottleneck; its outputs have its inputs' map, because a shortcut adds the two."""
        inner = self.conv(old.cv1, new.cv1, trunk)
        self.conv(old.cv2, new.cv2, inner, trunk)

    def copies(self, old: int, new: int) -> Tensor:
        """A new map: each old channel once at its own index, then random ones, all as often as possible."""
        again = [torch.randperm(old, generator=self.random) for _ in range(-(-(new - old) // old))]
        return torch.cat([torch.arange(old), *again])[:new]

    def silence(self, added: Sequence[Bottleneck]) -> None:
        """Make residual branches add nothing yet."""
        for conv in [conv for bottleneck in added for conv in (bottleneck.cv1.conv, bottleneck.cv2.conv)]:
            drawn = torch.randn(conv.weight.shape, generator=self.random)
            kept = torch.rand(conv.weight.shape, generator=self.random) < _DENSITY
            conv.weight.copy_(drawn * kept / (_DENSITY * conv.weight[0].numel()) ** 0.5)
        for bottleneck in added:
            bottleneck.cv2.bn.weight.fill_(_SILENT)

    def add_noise(self, model: YOLOv5, noise: float) -> None:
        for conv in [module.conv for module in model.modules() if isinstance(module, Conv)]:
            drawn = torch.randn(conv.weight.shape, generator=self.random)
            conv.weight.add_(drawn * (noise * conv.weight.square().mean().sqrt()))


def _widen(old: nn.Conv2d, new: nn.Conv2d, x: Tensor, out: Tensor | None = None) -> None:
    """Fill a convolution's weight from a narrower one's; without a map ``out`` the outputs are the same."""
    new.weight.zero_()
    new.weight[:, _firsts(x)] = old.weight if out is None else old.weight[out]


def _make_faint(conv: Conv, firsts: Tensor) -> None:
    """Shrink the incoming weights of all copies but the first, and let the batch norm make up for it."""
    factor = torch.full((conv.conv.out_channels,), _FAINT)
    factor[firsts] = 1.0
    mean, variance = cast(Tensor, conv.bn.running_mean), cast(Tensor, conv.bn.running_var)
    faint = variance * factor.square()
    conv.conv.weight.mul_(factor[:, None, None, None])
    conv.bn.weight.mul_(((faint + conv.bn.eps) / (variance + conv.bn.eps)).sqrt() / factor)
    mean.mul_(factor)
    variance.copy_(faint)


def _firsts(x: Tensor) -> Tensor:
    """For each old channel of a map, the index of the first new channel that copies it."""
    olds, positions = int(x.max()) + 1, torch.arange(len(x))
    return torch.full((olds,), len(x)).scatter_reduce(0, x, positions, "amin")


class _Spread(NamedTuple):
    """The distribution of each channel's values.

    Attributes:
        values: (C, P), at the P points of a quadrature.
        weights: (P,) of these points; their sum is 1.
    """

    values: Tensor
    weights: Tensor

    @classmethod
    def after(cls, norm: nn.BatchNorm2d) -> _Spread:
        """The distribution after a batch norm and SiLU, if the batch norm's input is normally distributed."""
        points, weights = np.polynomial.hermite_e.hermegauss(_POINTS)
        variance = cast(Tensor, norm.running_var)
        deviation = norm.weight * (variance / (variance + norm.eps)).sqrt()
        values = norm.bias[:, None] + deviation[:, None] * torch.from_numpy(points).float()
        return cls(silu(values), torch.from_numpy(weights / weights.sum()).float())

    def mean(self) -> Tensor:
        return self.values @ self.weights

    def centred(self) -> Tensor:
        return self.values - self.mean()[:, None]

    def variance(self) -> Tensor:
        return self.centred().square() @ self.weights


def _make_identity(last: Bottleneck, added: Sequence[Bottleneck], behind: Conv) -> None:
    """Make bottlenecks without a shortcut return (nearly) their input.

    Args:
        last: the bottleneck before them.
        added: the bottlenecks.
        behind: the 1x1 convolution that reads them as its first inputs; it reverses the shift and the slope
            that they leave.
    """
    wanted = now = _Spread.after(last.cv2.bn)
    for conv in [conv for bottleneck in added for conv in (bottleneck.cv1, bottleneck.cv2)]:
        now = _make_straight(conv, now, wanted)
    # the straight line that best predicts the wanted values from those that come out now
    slope = (now.centred() * wanted.centred()) @ now.weights / now.variance().clamp_min(1e-12)
    slope = torch.where(now.variance() > 1e-12, slope, 1.0)
    offset = wanted.mean() - slope * now.mean()
    trunk = behind.conv.weight[:, : len(slope)]
    cast(Tensor, behind.bn.running_mean).sub_(trunk[:, :, 0, 0] @ offset)
    trunk.mul_(slope[:, None, None])


def _make_straight(conv: Conv, now: _Spread, wanted: _Spread) -> _Spread:
    """Make a convolution pass on each channel with the wanted deviation and the wanted mean plus the shift.

    Args:
        conv: filled in place.
        now: the distribution of its inputs.
        wanted: the distribution that its outputs should have.

    Returns:
        The distribution of its outputs.
    """
    middle = conv.conv.kernel_size[0] // 2
    conv.conv.weight.zero_()
    conv.conv.weight[:, :, middle, middle] = torch.eye(len(now.values))
    gain = (wanted.variance() / now.variance().clamp_min(1e-12)).sqrt()
    conv.bn.weight.copy_(gain * (now.variance() + conv.bn.eps).sqrt())
    conv.bn.bias.copy_(wanted.mean() + _SHIFT)
    cast(Tensor, conv.bn.running_mean).copy_(now.mean())
    cast(Tensor, conv.bn.running_var).copy_(now.variance())
    return _Spread(silu(conv.bn.bias[:, None] + gain[:, None] * now.centred()), now.weights)


def _joined(*maps: Tensor) -> Tensor:
    """The map of a concatenation."""
    firsts = itertools.accumulate((int(m.max()) + 1 for m in maps), initial=0)
    return torch.cat([m + first for m, first in zip(maps, firsts, strict=False)])
