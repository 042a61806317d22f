"""YOLOv5 v6/v7 in five sizes, with the parameter names and outputs of the published checkpoints.

Written from the published architecture (https://github.com/ultralytics/yolov5, releases v6.0 to v7.0):
a CSP backbone of C3 blocks behind a 6x6 stem, SPPF, a PANet neck, and an anchor-based head at strides
8, 16 and 32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparse_exp.config.imgsz import Imgsz, plain, sides
from sparse_exp.errors import ConfigError, expected
from sparse_exp.metrics.anchors import PUBLISHED

STRIDES = (8, 16, 32)


class Scale(NamedTuple):
    """How a size scales the description of yolov5l.

    Attributes:
        depth: multiple of the number of bottlenecks.
        width: multiple of the number of channels.
    """

    depth: float
    width: float

    def channels(self, base: int) -> int:
        """``base`` channels scaled, rounded up to a multiple of 8."""
        return math.ceil(base * self.width / 8) * 8

    def repeats(self, base: int) -> int:
        """``base`` bottlenecks scaled, rounded, at least 1."""
        return max(round(base * self.depth), 1)


SCALES = {
    "n": Scale(0.33, 0.25),
    "s": Scale(0.33, 0.50),
    "m": Scale(0.67, 0.75),
    "l": Scale(1.0, 1.0),
    "x": Scale(1.33, 1.25),
}

Output = list[Tensor] | tuple[Tensor, list[Tensor]] | Tensor

JOINED_WITH = {12: 6, 16: 4, 19: 14, 22: 10}
"""For each concatenation of the neck, by its index in the model, the second module that it reads."""
HEAD_INPUTS = (17, 20, 23)
"""Indices of the modules that the head reads, by rising stride."""
_OUTPUT_STRIDES = (2, 4, 4, 8, 8, 16, 16, 32, 32, 32, 32, 16, 16, 16, 16, 8, 8, 8, 16, 16, 16, 32, 32, 32)
_NAME = re.compile(r"model\.(\d+)\.(?:m\.(\d+))?")


def output_stride(convolution: str) -> int:
    """Pixels of the image for each step of a convolution's output map, in either direction.

    Args:
        convolution: its published name, such as ``model.2.cv1.conv``.

    Raises:
        ValueError: a detector has no such convolution.
    """
    match = _NAME.match(convolution)
    index = int(match[1]) if match else -1
    if index == len(_OUTPUT_STRIDES) and match and match[2] and int(match[2]) < len(STRIDES):
        return STRIDES[int(match[2])]
    if not 0 <= index < len(_OUTPUT_STRIDES):
        raise ValueError(f"{convolution!r} is no convolution of a detector")
    return _OUTPUT_STRIDES[index]


class Conv(nn.Module):
    """Convolution without bias, batch normalization, SiLU.

    Args:
        c_in: input channels.
        c_out: output channels.
        kernel: side of the kernel in pixels.
        stride: step in pixels.
        padding: in pixels; None keeps the size at stride 1.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, padding: int | None = None
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        return cast(Tensor, self.act(self.bn(self.conv(x))))


class Add(nn.Module):
    """A residual addition, which as a module can be quantized; it has no tensors in the state dict.

    Attributes:
        wrap_qat: where SparseML itself runs a recipe, it quantizes the inputs of such modules.
        qat_wrapper_kwargs: of how many, likewise.
    """

    wrap_qat = True
    qat_wrapper_kwargs: ClassVar = {"num_inputs": 2, "num_outputs": 0}

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of two tensors of one shape."""
        return a + b


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution, with or without a shortcut around both.

    Args:
        channels: of input and output.
        shortcut: add the input to the output.
    """

    def __init__(self, channels: int, *, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels)
        self.cv2 = Conv(channels, channels, 3)
        if shortcut:
            self.add = Add()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, channels, H, W) to the same shape."""
        y = self.cv2(self.cv1(x))
        return cast(Tensor, self.add(x, y) if self.shortcut else y)


class C3(nn.Module):
    """Cross-stage-partial block: bottlenecks on one half of the channels, a 1x1 convolution on the other.

    Args:
        c_in: input channels.
        c_out: output channels.
        repeats: number of bottlenecks.
        shortcut: whether the bottlenecks are residual.
    """

    def __init__(self, c_in: int, c_out: int, repeats: int, *, shortcut: bool = True) -> None:
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden)
        self.cv2 = Conv(c_in, hidden)
        self.cv3 = Conv(2 * hidden, c_out)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut=shortcut) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, c_in, H, W) to (N, c_out, H, W)."""
        return cast(Tensor, self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1)))


class SPPF(nn.Module):
    """Spatial pyramid pooling by three 5x5 max-poolings in a row.

    Args:
        c_in: input channels.
        c_out: output channels.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        hidden = c_in // 2
        self.cv1 = Conv(c_in, hidden)
        self.cv2 = Conv(4 * hidden, c_out)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, c_in, H, W) to (N, c_out, H, W)."""
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.m(maps[-1]))
        return cast(Tensor, self.cv2(torch.cat(maps, 1)))


class Concat(nn.Module):
    """Joins two maps along the channels."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(N, Ca, H, W) and (N, Cb, H, W) to (N, Ca + Cb, H, W)."""
        return torch.cat([a, b], 1)


class Grid(NamedTuple):
    """Constants that decode raw predictions, for each of A predictions; each float (A, 2), in pixels.

    Attributes:
        scale: of the centre: twice the stride.
        shift: of the centre: (cell - 0.5) * stride.
        area: of the size: four times the anchor.
    """

    scale: Tensor
    shift: Tensor
    area: Tensor

    def decode(self, raw: Tensor) -> Tensor:
        """Raw predictions (N, A, 5 + nc) to xywh in input pixels, objectness and class scores in 0..1.

        These are the published formulas, ``xy = (2 sigmoid - 0.5 + cell) * stride`` and
        ``wh = (2 sigmoid)**2 * anchor``, with the constants multiplied out for all levels together: the
        exported graph then decodes in a handful of nodes.
        """
        if raw.dtype != torch.float32:
            raw = raw.float()
        scores = raw.sigmoid()
        xy, wh = scores[..., :2], scores[..., 2:4]
        return torch.cat([xy * self.scale + self.shift, wh * wh * self.area, scores[..., 4:]], -1)


def make_grid(anchors: Tensor, sizes: Sequence[tuple[int, int]]) -> Grid:
    """The grid for maps of the given sizes.

    Args:
        anchors: (levels, 3, 2) width and height in units of the level's stride.
        sizes: (ny, nx) of each level's map, in cells.

    Returns:
        Constants for A = sum of 3 * ny * nx predictions: by level, then anchor, then y, then x.
    """
    scales, shifts, areas = [], [], []
    for stride, anchor, (ny, nx) in zip(STRIDES, anchors.float(), sizes, strict=True):
        y = torch.arange(ny, device=anchors.device).view(1, ny, 1).expand(3, ny, nx)
        x = torch.arange(nx, device=anchors.device).view(1, 1, nx).expand(3, ny, nx)
        shifts.append((torch.stack([x, y], -1).reshape(-1, 2) - 0.5) * stride)
        scales.append(torch.full_like(shifts[-1], 2.0 * stride))
        areas.append((4 * stride * anchor).repeat_interleave(ny * nx, dim=0))
    return Grid(torch.cat(scales), torch.cat(shifts), torch.cat(areas))


class Detect(nn.Module):
    """The head: one 1x1 convolution per level, and the decoding of their outputs.

    Args:
        num_classes: number of classes, at least 1.
        channels: of the three input maps, by rising stride.

    Attributes:
        anchors: buffer (3, 3, 2): level, anchor, width and height in units of the level's stride.
        static: sizes (ny, nx) of the maps and their grid, set during export (see `YOLOv5.export_mode`).
    """

    anchors: Tensor

    def __init__(self, num_classes: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.outputs = 5 + num_classes
        self.static: tuple[list[tuple[int, int]], Grid] | None = None
        strides = torch.tensor(STRIDES).view(-1, 1, 1)
        self.register_buffer("anchors", torch.tensor(PUBLISHED, dtype=torch.float32) / strides)
        self.m = nn.ModuleList(nn.Conv2d(c, 3 * self.outputs, 1) for c in channels)
        with torch.no_grad():  # as published: expect about 8 objects in a 640 px image, and even classes
            for conv, stride in zip(self.m, STRIDES, strict=True):
                bias = cast(Tensor, conv.bias).view(3, -1)
                bias[:, 4] += math.log(8 / (640 / stride) ** 2)
                bias[:, 5:] += math.log(0.6 / (num_classes - 0.99999))

    def forward(self, maps: Sequence[Tensor]) -> Output:
        """Three maps (N, C, ny, nx) to the output that `YOLOv5.forward` describes."""
        if self.static is None:
            sizes = [(m.shape[-2], m.shape[-1]) for m in maps]
            grid = None if self.training else make_grid(self.anchors, sizes)
        else:
            sizes, grid = self.static
        raw = [
            conv(m).view(-1, 3, self.outputs, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            for conv, m, (ny, nx) in zip(self.m, maps, sizes, strict=True)
        ]
        if grid is None:
            return raw
        flat = [r.view(-1, 3 * ny * nx, self.outputs) for r, (ny, nx) in zip(raw, sizes, strict=True)]
        predictions = grid.decode(torch.cat(flat, 1))
        return predictions if self.static is not None else (predictions, raw)


def _layers(scale: Scale, num_classes: int) -> list[nn.Module]:
    """The 25 modules in the order of the published description."""
    c1, c2, c3, c4, c5 = (scale.channels(c) for c in (64, 128, 256, 512, 1024))
    few, more, most = (scale.repeats(n) for n in (3, 6, 9))
    backbone = [
        Conv(3, c1, 6, 2, 2),
        Conv(c1, c2, 3, 2),
        C3(c2, c2, few),
        Conv(c2, c3, 3, 2),
        C3(c3, c3, more),
        Conv(c3, c4, 3, 2),
        C3(c4, c4, most),
        Conv(c4, c5, 3, 2),
        C3(c5, c5, few),
        SPPF(c5, c5),
    ]
    neck = [
        Conv(c5, c4),
        nn.Upsample(scale_factor=2, mode="nearest"),
        Concat(),
        C3(2 * c4, c4, few, shortcut=False),
        Conv(c4, c3),
        nn.Upsample(scale_factor=2, mode="nearest"),
        Concat(),
        C3(2 * c3, c3, few, shortcut=False),
        Conv(c3, c3, 3, 2),
        Concat(),
        C3(2 * c3, c4, few, shortcut=False),
        Conv(c4, c4, 3, 2),
        Concat(),
        C3(2 * c4, c5, few, shortcut=False),
    ]
    return [*backbone, *neck, Detect(num_classes, (c3, c4, c5))]


class YOLOv5(nn.Module):
    """A YOLOv5 v6/v7 detector.

    Args:
        size: one of n, s, m, l, x.
        num_classes: number of classes, at least 1.

    Attributes:
        size: as given.
        num_classes: as given.
        widths: number of channels in each group (see `sparse_exp.yolov5.channels`) where the detector was
            slimmed; empty for the stock sizes.
        model: 25 modules, numbered and named as in the published checkpoints.
        stem: name of the first convolution, which reads the pixels.

    Raises:
        ConfigError: the size is unknown, or there are no classes.
    """

    stem = "model.0.conv"

    def __init__(self, size: str, num_classes: int) -> None:
        super().__init__()
        if size not in SCALES:
            choices = f"one of {', '.join(SCALES)}"
            raise ConfigError(expected("the size of YOLOv5", choices, size, "Change model.size."))
        if num_classes < 1:
            do = "Name the classes in the data yaml."
            raise ConfigError(expected("the number of classes", "at least 1", num_classes, do))
        self.size = size
        self.num_classes = num_classes
        self.widths: dict[str, int] = {}
        self.model = nn.Sequential(*_layers(SCALES[size], num_classes))

    @property
    def head(self) -> Detect:
        """The last module, which turns feature maps into predictions."""
        return cast(Detect, self.model[-1])

    @property
    def anchors(self) -> Tensor:
        """(3, 3, 2): level, anchor, width and height in units of the level's stride."""
        return self.head.anchors

    def forward(self, x: Tensor) -> Output:
        """Predict boxes from images.

        Args:
            x: (N, 3, H, W) RGB in 0..1; H and W multiples of 32.

        Returns:
            In training mode a list of three raw maps (N, 3, ny, nx, 5 + nc) at strides 8, 16, 32.
            In evaluation mode a pair: predictions float32 (N, A, 5 + nc) - xywh in input pixels, objectness
            and class scores in 0..1, ordered by level, anchor, y, x; A = 25200 at 640 px - and that list.
            In `export_mode` only the predictions.
        """
        kept: dict[int, Tensor] = {}
        layers = list(self.model)
        for index, layer in enumerate(layers[:-1]):
            x = layer(x, kept[JOINED_WITH[index]]) if index in JOINED_WITH else layer(x)
            kept[index] = x
        return cast(Output, layers[-1]([kept[index] for index in HEAD_INPUTS]))

    @contextmanager
    def export_mode(self, imgsz: Imgsz) -> Iterator[YOLOv5]:
        """Put the model into evaluation mode for tracing, with images of one size and any batch size.

        Within the block the model returns only predictions. Sizes are Python integers and the grid is a
        constant, so that the traced graph has no shape arithmetic. A deep copy made within the block stays in
        this mode.

        Args:
            imgsz: size of the images, each side a multiple of 32.

        Yields:
            The model itself.

        Raises:
            ConfigError: a side is no positive multiple of 32.
        """
        height, width = sides(imgsz)
        if any(side < STRIDES[-1] or side % STRIDES[-1] for side in (height, width)):
            do = "Change dataset.imgsz."
            raise ConfigError(expected("imgsz", "a positive multiple of 32", plain(imgsz), do))
        head, was_training = self.head, self.training
        sizes = [(height // stride, width // stride) for stride in STRIDES]
        head.static = (sizes, make_grid(head.anchors, sizes))
        self.eval()
        try:
            yield self
        finally:
            head.static = None
            if was_training:
                self.train()

    def quantizable_convolutions(self) -> dict[str, nn.Conv2d]:
        """All convolutions by their published names, whether SparseML has wrapped or fused them or not."""
        return {
            name.removesuffix(".module"): module
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d)
        }

    def prunable_convolutions(self) -> dict[str, nn.Conv2d]:
        """`quantizable_convolutions` without the stem and the head's: few weights, costly to prune."""
        head = f"model.{len(self.model) - 1}."
        convolutions = self.quantizable_convolutions().items()
        return {name: c for name, c in convolutions if name != self.stem and not name.startswith(head)}
