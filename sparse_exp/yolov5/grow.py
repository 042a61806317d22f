"""Growing a detector: a larger size that computes (nearly) what a smaller one does.

Net2Net (Chen, Goodfellow and Shlens 2016, https://arxiv.org/abs/1511.05641) for YOLOv5 v6/v7, so that a size
of which no checkpoint can be had starts from what a smaller one has learned.

*Wider.* Each new channel copies an old one. What reads a channel that has copies gets its weight shared out
among them, so that the sum stays: any shares are exact, and here the first copy gets the whole weight. The
incoming weights of the others are a tenth, for which their batch norm makes up: exact too. A grown start is
pruned next, by magnitude, which then takes the second copy of every weight before the first. With equal
halves, from s to l, each old weight becomes four small equal ones, and most are lost. Measured on yolov5s
(COCO) grown to l, pruned to 90 % and its batch norms fitted anew, as relative error of the maps that the head
reads (17, 20, 23): equal halves 0.70, 0.83, 0.92; the whole weight to a copy drawn for each pair of channels
0.47, 0.59, 0.68; as it is here 0.22, 0.28, 0.33. For comparison s itself, pruned to 40 % 0.18, 0.23, 0.29 and
to 75 % 0.54, 0.67, 0.75.

*Deeper.* A new bottleneck of the backbone adds to what comes by its shortcut: at first nothing, in training
mode too, as the scale of its last batch norm is next to 0, from where it learns. Its convolutions are random
and sparse, so that pruning leaves most of the weights to the old layers. The neck's bottlenecks have no
shortcut: a new one passes each channel on through SiLU, shifted to where it is nearly straight. What slope
and shift are left the convolution behind them takes back. They follow from the batch norm before, whose
outputs are taken to be normally distributed; the maps that the head reads change by less than 1 %.
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
# The scale from which a residual branch starts. At 0 itself QAT, which divides by it, would give NaN; this
# adds less than float32 resolves.
_SILENT = 1e-8
_SHIFT = 6.0  # of SiLU: more is straighter (8: 0.15 %), and leaves fewer of QAT's 256 steps to what varies
_FAINT = 0.1  # incoming weights of a copy as a share of those of the first
_DENSITY = 0.05  # of a new residual branch: a dense one would take a large part of what pruning leaves
_POINTS = 64  # at which a normal distribution is looked at


@torch.no_grad()
def grow(checkpoint: Checkpoint, size: str, *, seed: int = 0, noise: float = 1e-3) -> Checkpoint:
    """Make a larger detector of a smaller one.

    Args:
        checkpoint: n, s, m or l in floating point; left as it is. Zeros are not kept: a sparse one becomes a
            dense one, whose smallest weights they are.
        size: of the new one: larger than the checkpoint's.
        seed: of everything random; nothing else is.
        noise: standard deviation of what is added to the weights of every convolution but the head's, as a
            share of their root mean square. It makes copies differ, and weights that got no share more
            than 0, at which a recipe would hold them.

    Returns:
        The same classes and names; float32 tensors of the new size by their published names. It has no
        metrics and no recipe: neither is true of it.

    Raises:
        CheckpointError: ``size`` is not larger, or a tensor of the checkpoint's size is missing, or is
            quantized.
    """
    larger = _ORDER[_ORDER.index(checkpoint.size) + 1 :]
    if size not in larger:
        should_be = f"larger than {checkpoint.size} ({', '.join(larger) or 'there is none'})"
        do = "Name smaller sizes in model.grow_from."
        raise CheckpointError(expected("the size that a checkpoint is grown to", should_be, size, do))
    with torch.random.fork_rng(devices=[]):
        small, large = (YOLOv5(s, checkpoint.num_classes) for s in (checkpoint.size, size))
    transfer_weights(small, checkpoint)
    growth = _Growth(torch.Generator().manual_seed(seed))
    growth.detector(small, large)
    growth.blur(large, noise)
    state, phase = dict(large.state_dict()), checkpoint.phase and "dense"
    return replace(checkpoint, size=size, state_dict=state, recipe="", phase=phase, metrics={})


@dataclass(frozen=True)
class _Growth:
    """Fills the modules of a larger detector from those of a smaller one.

    A *map* says of each new channel which old one it copies: int64 (new channels,).
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
        """Fill a C3 block that reads the map ``x``; returns the map of its outputs, as do the next two."""
        trunk, side = self.conv(old.cv1, new.cv1, x), self.conv(old.cv2, new.cv2, x)
        for ours, theirs in zip(old.m, new.m, strict=False):
            self.bottleneck(cast(Bottleneck, ours), cast(Bottleneck, theirs), trunk)
        out = self.conv(old.cv3, new.cv3, _joined(trunk, side))
        bottlenecks = [cast(Bottleneck, b) for b in new.m]
        if bottlenecks[0].shortcut:
            self.silence(bottlenecks[len(old.m) :])
        else:
            _pass_on(bottlenecks[len(old.m) - 1], bottlenecks[len(old.m) :], new.cv3)
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
        """Outputs are copied as inputs are: the two may be added, and the next bottleneck reads them."""
        inner = self.conv(old.cv1, new.cv1, trunk)
        self.conv(old.cv2, new.cv2, inner, trunk)

    def copies(self, old: int, new: int) -> Tensor:
        """A map: each old channel once in its place, then again as evenly as can be, drawn at random."""
        again = [torch.randperm(old, generator=self.random) for _ in range(-(-(new - old) // old))]
        return torch.cat([torch.arange(old), *again])[:new]

    def silence(self, added: Sequence[Bottleneck]) -> None:
        """Residual branches that add nothing yet."""
        for conv in [conv for bottleneck in added for conv in (bottleneck.cv1.conv, bottleneck.cv2.conv)]:
            drawn = torch.randn(conv.weight.shape, generator=self.random)
            kept = torch.rand(conv.weight.shape, generator=self.random) < _DENSITY
            conv.weight.copy_(drawn * kept / (_DENSITY * conv.weight[0].numel()) ** 0.5)
        for bottleneck in added:
            bottleneck.cv2.bn.weight.fill_(_SILENT)

    def blur(self, model: YOLOv5, noise: float) -> None:
        for conv in [module.conv for module in model.modules() if isinstance(module, Conv)]:
            drawn = torch.randn(conv.weight.shape, generator=self.random)
            conv.weight.add_(drawn * (noise * conv.weight.square().mean().sqrt()))


def _widen(old: nn.Conv2d, new: nn.Conv2d, x: Tensor, out: Tensor | None = None) -> None:
    """Fill a convolution's weight; without a map ``out`` its outputs stay."""
    new.weight.zero_()
    new.weight[:, _firsts(x)] = old.weight if out is None else old.weight[out]


def _make_faint(conv: Conv, firsts: Tensor) -> None:
    """Make the incoming weights of all but the first copies smaller; what comes out is the same."""
    factor = torch.full((conv.conv.out_channels,), _FAINT)
    factor[firsts] = 1.0
    mean, variance = cast(Tensor, conv.bn.running_mean), cast(Tensor, conv.bn.running_var)
    faint = variance * factor.square()
    conv.conv.weight.mul_(factor[:, None, None, None])
    conv.bn.weight.mul_(((faint + conv.bn.eps) / (variance + conv.bn.eps)).sqrt() / factor)
    mean.mul_(factor)
    variance.copy_(faint)


def _firsts(x: Tensor) -> Tensor:
    """Of a map: for each old channel the first new one that copies it."""
    olds, positions = int(x.max()) + 1, torch.arange(len(x))
    return torch.full((olds,), len(x)).scatter_reduce(0, x, positions, "amin")


class _Spread(NamedTuple):
    """How the values of each channel are distributed.

    Attributes:
        values: (C, P), at the points of a quadrature.
        weights: (P,) of these points; their sum is 1.
    """

    values: Tensor
    weights: Tensor

    @classmethod
    def after(cls, norm: nn.BatchNorm2d) -> _Spread:
        """Behind a batch norm and SiLU, where the batch norm's input is normally distributed."""
        points, weights = np.polynomial.hermite_e.hermegauss(_POINTS)  # type: ignore[no-untyped-call]
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


def _pass_on(last: Bottleneck, added: Sequence[Bottleneck], behind: Conv) -> None:
    """Make bottlenecks without shortcut give on what they get.

    Args:
        last: the bottleneck before them.
        added: these.
        behind: the 1x1 convolution that reads them (its first inputs), which takes back what is left of their
            shift and slope.
    """
    wanted = now = _Spread.after(last.cv2.bn)
    for conv in [conv for bottleneck in added for conv in (bottleneck.cv1, bottleneck.cv2)]:
        now = _straight(conv, now, wanted)
    # the straight line through (now, wanted) that fits best
    slope = (now.centred() * wanted.centred()) @ now.weights / now.variance().clamp_min(1e-12)
    slope = torch.where(now.variance() > 1e-12, slope, 1.0)
    offset = wanted.mean() - slope * now.mean()
    trunk = behind.conv.weight[:, : len(slope)]
    cast(Tensor, behind.bn.running_mean).sub_(trunk[:, :, 0, 0] @ offset)
    trunk.mul_(slope[:, None, None])


def _straight(conv: Conv, now: _Spread, wanted: _Spread) -> _Spread:
    """Make a convolution pass each channel on with the wanted mean (but for the shift) and deviation."""
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
