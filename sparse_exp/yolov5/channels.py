"""Channels of a detector: which convolutions share them, and detectors with fewer than the stock sizes have.

A *group* is a set of channels that stand or fall together: the outputs of a convolution, or of several where
residual additions join them. It is called after the first convolution that makes it, such as ``model.2.cv1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_exp.errors import CheckpointError, expected
from sparse_exp.yolov5.model import C3, HEAD_INPUTS, JOINED_WITH, SPPF, Bottleneck, Concat, Conv, YOLOv5

IMAGE = "image"
_NORMS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Layer:
    """A convolution between groups.

    Attributes:
        name: of the module: a `Conv`, or one of the head's convolutions.
        reads: the groups of its input, in their order; `IMAGE` stands for the three colours.
        gives: the group of its output; "" for the head.
    """

    name: str
    reads: tuple[str, ...]
    gives: str = ""

    @property
    def convolution(self) -> str:
        """Name of the convolution itself."""
        return f"{self.name}.conv" if self.gives else self.name


def layers_of(model: YOLOv5) -> list[Layer]:
    """All convolutions of a detector in the order in which they compute, and the groups between them."""
    found: list[Layer] = []

    def conv(name: str, reads: Sequence[str], gives: str = "") -> list[str]:
        found.append(Layer(name, tuple(reads), gives or name))
        return [found[-1].gives]

    def c3(name: str, module: C3, reads: list[str]) -> list[str]:
        trunk, side = conv(f"{name}.cv1", reads), conv(f"{name}.cv2", reads)
        for index, bottleneck in enumerate(module.m):
            inner = conv(f"{name}.m.{index}.cv1", trunk)
            added = trunk[0] if cast(Bottleneck, bottleneck).shortcut else ""
            trunk = conv(f"{name}.m.{index}.cv2", inner, added)
        return conv(f"{name}.cv3", trunk + side)

    x, kept = [IMAGE], dict[int, list[str]]()
    for index, module in enumerate(model.model[:-1]):
        name = f"model.{index}"
        if isinstance(module, Concat):
            x = x + kept[JOINED_WITH[index]]
        elif isinstance(module, Conv):
            x = conv(name, x)
        elif isinstance(module, C3):
            x = c3(name, module, x)
        elif isinstance(module, SPPF):
            x = conv(f"{name}.cv2", 4 * conv(f"{name}.cv1", x))
        kept[index] = x
    head = f"model.{len(model.model) - 1}.m"
    return found + [Layer(f"{head}.{i}", tuple(kept[at])) for i, at in enumerate(HEAD_INPUTS)]


def channels_of(model: YOLOv5) -> dict[str, int]:
    """Number of channels in each group of a detector."""
    return {
        layer.gives: cast(nn.Conv2d, model.get_submodule(layer.convolution)).out_channels
        for layer in layers_of(model)
        if layer.gives
    }


def build_detector(size: str, num_classes: int, widths: Mapping[str, int] | None = None) -> YOLOv5:
    """A detector with initial weights.

    Args:
        size: one of n, s, m, l, x.
        num_classes: number of classes, at least 1.
        widths: number of channels in each group; None or empty: those of the stock size.

    Raises:
        ConfigError: see `YOLOv5`.
        CheckpointError: the groups are not those of the size, or have more channels, or none.
    """
    model = YOLOv5(size, num_classes)
    if widths:
        stock = channels_of(model)
        wrong = [name for name in {**stock, **widths} if not 1 <= widths.get(name, 0) <= stock.get(name, 0)]
        if wrong:
            got, most = widths.get(wrong[0], "none"), stock.get(wrong[0], 0)
            do = "Its list of widths is damaged; use another checkpoint."
            raise CheckpointError(
                expected(f"the width of {wrong[0]} in yolov5{size}", f"1 to {most} channels", got, do)
            )
        keep_channels(model, {name: torch.arange(widths[name]) for name in stock})
    return model


@dataclass(frozen=True)
class Cut:
    """What of a tensor stays.

    Attributes:
        outputs: int64 indices into its first axis.
        inputs: into its second; None: all.
    """

    outputs: Tensor
    inputs: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """What stays of a tensor, as one of its own in the same memory layout."""
        layout = torch.contiguous_format
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        part = tensor[self.outputs.to(tensor.device)]
        if self.inputs is not None:
            part = part[:, self.inputs.to(tensor.device)]
        return part.contiguous(memory_format=layout)


def cuts_of(model: YOLOv5, kept: Mapping[str, Tensor]) -> dict[str, Cut]:
    """What of each parameter and buffer stays, by its name, where only some channels do.

    Args:
        model: the detector.
        kept: for each group the indices of its channels that stay, int64, rising; a group that is not named
            keeps all.
    """
    channels, cuts = channels_of(model), dict[str, Cut]()
    whole = {name: torch.arange(count) for name, count in {**channels, IMAGE: 3}.items()} | dict(kept)
    for layer in layers_of(model):
        conv = cast(Any, model.get_submodule(layer.convolution))
        firsts, inputs = 0, list[Tensor]()
        for group in layer.reads:
            inputs.append(whole[group] + firsts)
            firsts += channels.get(group, 3)
        outputs = whole[layer.gives] if layer.gives else torch.arange(conv.out_channels)
        cuts[f"{layer.convolution}.weight"] = Cut(outputs, torch.cat(inputs))
        if layer.gives:
            cuts |= {f"{layer.name}.bn.{part}": Cut(outputs) for part in _NORMS}
        for name, buffer in conv.named_buffers():  # the ranges of a weight that is rounded channel by channel
            if name.startswith("weight_quantizer.") and len(buffer) == conv.out_channels > 1:
                cuts[f"{layer.convolution}.{name}"] = Cut(outputs)
    return cuts


@torch.no_grad()
def keep_channels(model: YOLOv5, kept: Mapping[str, Tensor]) -> dict[str, Cut]:
    """Take channels out of a detector for good. Its modules and parameters stay the same objects.

    Where all removed channels are 0, it computes what it did before.

    Args:
        model: changed in place; gradients are dropped.
        kept: see `cuts_of`.

    Returns:
        What stayed of each parameter and buffer.
    """
    cuts = cuts_of(model, kept)
    for name, cut in cuts.items():
        place, _, attribute = name.rpartition(".")
        tensor = getattr(model.get_submodule(place), attribute)
        tensor.grad = None
        tensor.data = cut.of(tensor.data)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.weight)
    widths = channels_of(model)
    with torch.device("meta"):
        stock = channels_of(YOLOv5(model.size, model.num_classes))
    model.widths = widths if widths != stock else {}
    return cuts


def readers(layers: Sequence[Layer], group: str) -> Iterator[tuple[Layer, int]]:
    """The layers that read a group, and how often each does (SPPF reads one four times)."""
    yield from ((layer, layer.reads.count(group)) for layer in layers if group in layer.reads)
