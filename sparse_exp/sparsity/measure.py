"""How sparse weights are, in torch and in ONNX, and the contract that they stay so."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto
from torch import nn

from sparse_exp.config.imgsz import Imgsz, sides
from sparse_exp.errors import SparsityError, StageFailed, expected
from sparse_exp.sparsity.onnx_graph import constants, per_channel, producers, quantized_weight
from sparse_exp.sparsity.prune import BLOCKS, Block, blocks
from sparse_exp.yolov5.model import STRIDES, YOLOv5, output_stride

MEGABYTE, GIGA = 1e6, 1e9


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros of one convolution.

    Attributes:
        name: qualified name of the layer, such as ``model.2.cv1.conv``.
        zeros: weights that are exactly 0.
        weights: weights in all.
    """

    name: str
    zeros: int
    weights: int

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0..1."""
        return self.zeros / self.weights

    def macs(self, imgsz: Imgsz) -> int:
        """Multiplications for one image, each with an addition (MACs), those with zeros included.

        Args:
            imgsz: size of the image, each side a multiple of 32.

        Raises:
            ValueError: the name is not that of a detector's layer.
        """
        stride = output_stride(self.name)
        return self.weights * math.prod(side // stride for side in sides(imgsz))


def layer_sparsity(convolutions: Mapping[str, nn.Conv2d]) -> list[LayerSparsity]:
    """Zeros of each convolution's weight, as it is stored (before fake quantization)."""
    return [
        LayerSparsity(name, int((conv.weight == 0).sum()), conv.weight.numel())
        for name, conv in convolutions.items()
    ]


def state_sparsity(state: Mapping[str, torch.Tensor]) -> list[LayerSparsity]:
    """Zeros of each convolution in a state dict, by published names also where QAT has wrapped it.

    Args:
        state: of a detector; convolution weights are its only ``.weight`` tensors with four axes.
    """
    return [
        LayerSparsity(_layer_of(name), int((tensor == 0).sum()), tensor.numel())
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.ndim == 4
    ]


def _layer_of(weight: str) -> str:
    return weight.removesuffix(".weight").removesuffix(".module")


def overall(layers: Sequence[LayerSparsity]) -> float:
    """Share of zeros in all given layers together, 0..1."""
    return sum(layer.zeros for layer in layers) / max(1, sum(layer.weights for layer in layers))


def total_macs(convolutions: Mapping[str, nn.Conv2d], imgsz: Imgsz) -> int:
    """Multiplications of convolutions for one image of size ``imgsz``; see `LayerSparsity.macs`."""
    return sum(LayerSparsity(name, 0, c.weight.numel()).macs(imgsz) for name, c in convolutions.items())


def stock_macs(size: str, num_classes: int, imgsz: Imgsz) -> int:
    """`total_macs` of a detector of a size as it was published: n, s, m, l or x."""
    with torch.device("meta"):
        return total_macs(YOLOv5(size, num_classes).quantizable_convolutions(), imgsz)


def work_sparsity(layers: Sequence[LayerSparsity]) -> float:
    """Share of the multiplications of all given layers that meet a zero, 0..1; of no layer 0.

    It says how much an engine can gain that skips zeros: of `overall`'s 75 % in the late layers, whose maps
    are small, less than of 75 % in the early ones.
    """
    macs = [layer.macs(STRIDES[-1]) for layer in layers]  # the share is that of any image size
    met = sum(layer.sparsity * count for layer, count in zip(layers, macs, strict=True))
    return met / max(1, sum(macs))


def require_sparsity(layers: Sequence[LayerSparsity], at_least: float, where: str) -> None:
    """Refuse weights that are less sparse than was planned.

    Args:
        layers: the prunable convolutions.
        at_least: planned share of zeros, 0..1; a tenth of a percent less is let pass.
        where: completes the message, such as ``"in best_pruned.pt"``.

    Raises:
        SparsityError: there are fewer zeros.
    """
    found = overall(layers)
    if found < at_least - 0.001:
        do = "Look at the recipe and at model.sparsity; the model was not kept sparse."
        raise SparsityError(expected(f"the sparsity {where}", f"at least {at_least:.2%}", f"{found:.2%}", do))


def require_layer_sparsity(
    layers: Sequence[LayerSparsity], promised: Mapping[str, float], where: str
) -> None:
    """Refuse weights of which any layer is less sparse than was promised.

    Args:
        layers: what was found, under the names of ``promised``.
        promised: least share of zeros of each layer, 0..1; one weight less is let pass.
        where: completes the message, such as ``"after epoch 3"``.

    Raises:
        SparsityError: a layer has fewer zeros or is missing; the first are named with both shares.
    """
    found = {layer.name: layer for layer in layers}
    short = [name for name, share in promised.items() if share > 0 and not _reaches(found.get(name), share)]
    if short:
        texts = [_shortage(name, found.get(name), promised[name]) for name in short]
        raise SparsityError(
            f"Expected each layer to have its promised share of zeros {where}, but got less in "
            f"{listed(texts)}. The model was not kept sparse; look at the recipe's pruning modifiers."
        )


def _reaches(layer: LayerSparsity | None, share: float) -> bool:
    return layer is not None and layer.zeros >= share * layer.weights - 1


def _shortage(name: str, layer: LayerSparsity | None, share: float) -> str:
    return f"{name} ({f'{layer.sparsity:.2%}' if layer else 'missing'} of {share:.2%})"


def listed(names: Sequence[str]) -> str:
    """Names for a message: the first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def sparsity_table(layers: Sequence[LayerSparsity], promised: Mapping[str, float], imgsz: Imgsz) -> str:
    """Zeros and work per layer as CSV: ``layer,weights,zeros,sparsity,promised,macs``.

    Args:
        layers: a row each.
        promised: least share of zeros of each layer, 0..1; 0 for those it does not name.
        imgsz: size of the image that multiplications are counted for.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("layer", "weights", "zeros", "sparsity", "promised", "macs"))
    for layer in layers:
        shares = (f"{layer.sparsity:.6f}", f"{promised.get(layer.name, 0.0):.6f}")
        table.writerow((layer.name, layer.weights, layer.zeros, *shares, layer.macs(imgsz)))
    return text.getvalue()


@dataclass
class SparsityContract:
    """The zeros that must stay zero, and the number that there must be.

    Attributes:
        masks: for each convolution a bool tensor, True where the weight is promised to be 0.
    """

    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, convolutions: Mapping[str, nn.Conv2d]) -> SparsityContract:
        """Promise that every weight that is 0 now stays 0."""
        return cls({name: _zeros(conv) for name, conv in convolutions.items()})

    def extend(self, convolutions: Mapping[str, nn.Conv2d], expected: Mapping[str, float]) -> None:
        """Promise the zeros that a recipe has made by now.

        A layer's zeros are the recipe's where there are as many as it expects, to one weight. Where
        there are more, some are zero by chance (such as float16 underflow in a published checkpoint),
        and nobody knows which: then what was promised before goes on.

        Args:
            convolutions: the layers.
            expected: least share of zeros of each layer, 0..1.
        """
        for name, conv in convolutions.items():
            wanted, zeros = expected.get(name, 0.0) * conv.weight.numel(), _zeros(conv)
            more = name not in self.masks or int(self.masks[name].sum()) < round(wanted)
            if wanted >= 1 and more and abs(int(zeros.sum()) - wanted) <= 1:
                self.masks[name] = zeros

    def check(
        self, convolutions: Mapping[str, nn.Conv2d], when: str, expected: Mapping[str, float] | None = None
    ) -> None:
        """Compare a model with what was promised.

        Args:
            convolutions: the layers, under the names they had before.
            when: completes the message, such as ``"after epoch 3"``.
            expected: least share of zeros of each layer by now, 0..1.

        Raises:
            SparsityError: a promised zero is none, or there are too few; the layers are named.
            StageFailed: weights are no numbers any more.
        """
        lost = [name for name, conv in convolutions.items() if not conv.weight.isfinite().all()]
        if lost:
            raise StageFailed(
                f"The weights {when} are not finite in {listed(lost)}. Make the learning rate smaller "
                "(trainer.lr, or that of the recipe)."
            )
        drifted = [
            name
            for name, mask in self.masks.items()
            if name not in convolutions or bool((convolutions[name].weight.detach()[mask] != 0).any())
        ]
        if drifted:
            raise SparsityError(
                f"Expected every pruned weight to be 0 {when}, but got others in {listed(drifted)}. The "
                "recipe does not hold the mask; add a ConstantPruningModifier that covers the whole training."
            )
        require_layer_sparsity(layer_sparsity(convolutions), expected or {}, when)

    def promised(self, expected: Mapping[str, float]) -> dict[str, float]:
        """Least share of zeros of each layer: what is held already, or what is expected if that is more."""
        held = {name: float(mask.double().mean()) for name, mask in self.masks.items()}
        return {name: max(held.get(name, 0.0), share) for name, share in {**held, **expected}.items()}


def _zeros(conv: nn.Conv2d) -> torch.Tensor:
    return conv.weight.detach() == 0


@dataclass(frozen=True)
class OnnxFacts:
    """What an ONNX file holds.

    Attributes:
        layers: zeros of each convolution, in the order of the graph.
        quantized: convolutions that compute on 8-bit integers, or would with the quantize and
            dequantize nodes around them.
        convolutions: convolutions in all.
    """

    layers: list[LayerSparsity]
    quantized: int
    convolutions: int


def onnx_facts(path: Path) -> OnnxFacts:
    """Read the convolutions of an ONNX file: floating point, integer (ConvInteger) or QDQ.

    In an integer weight the value that stands for 0 is the weight's zero point.
    """
    layers, quantized = [], 0
    for name, weight, zero, is_integer in _convolutions(path):
        layers.append(LayerSparsity(name, int((weight == zero).sum()), weight.size))
        quantized += is_integer
    return OnnxFacts(layers, quantized, len(layers))


def nonzero_bytes(path: Path) -> int:
    """Bytes of the weights of an ONNX file's convolutions that are not 0, each as wide as it is stored.

    A weight in floating point that a QuantizeLinear node rounds when the file is run counts as the 8 bits
    that it becomes.
    """
    weights = [(weight, zero) for _, weight, zero, _ in _convolutions(path)]
    return sum(
        int((w != zero).sum()) * (1 if zero.dtype.itemsize == 1 else w.itemsize) for w, zero in weights
    )


def _convolutions(path: Path) -> Iterator[tuple[str, NDArray[Any], NDArray[Any], bool]]:
    """Of each convolution its name and what `_weight_of` says."""
    graph = onnx.load(str(path)).graph
    arrays, makers = constants(graph), producers(graph)
    for node in graph.node:
        if node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
            yield node.name or node.output[0], *_weight_of(node, arrays, makers)


def _weight_of(
    node: NodeProto, arrays: Mapping[str, NDArray[Any]], makers: Mapping[str, NodeProto]
) -> tuple[NDArray[Any], NDArray[Any], bool]:
    """A convolution's weight, what stands for zero in it, and whether its input is quantized too."""
    inputs, kind = list(node.input), node.op_type
    if kind == "ConvInteger":
        zero = arrays[inputs[3]] if len(inputs) > 3 and inputs[3] else np.zeros(())
        return arrays[inputs[1]], per_channel(zero), True
    if kind == "QLinearConv":
        return arrays[inputs[3]], per_channel(arrays[inputs[5]]), True
    dequantize = makers.get(inputs[1])
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return arrays[inputs[1]], np.zeros(()), False
    stored, _, *zeros = list(dequantize.input)
    weight = arrays[stored] if stored in arrays else quantized_weight(makers[stored], arrays)
    zero = arrays[zeros[0]] if zeros else np.zeros(())
    feeder = makers.get(inputs[0])
    input_is_quantized = feeder is not None and feeder.op_type == "DequantizeLinear"
    return weight, per_channel(zero), input_is_quantized


def gzip_bytes(path: Path) -> int:
    """Size of a file compressed with gzip at its usual level, in bytes; nothing is written."""
    return len(gzip.compress(path.read_bytes(), compresslevel=6, mtime=0))


SPARSE_FROM = 0.10  # share of zeros from which a checkpoint counts as pruned; SparseML's own threshold


_IN_BLOCKS_FROM = 0.99  # share of the zeros that lie in whole blocks; single ones may be so by chance


def in_blocks(weights: Iterable[torch.Tensor], block: Block = BLOCKS["block4"]) -> bool:
    """Whether there are zeros, and they come in blocks; by default of four input channels.

    Args:
        weights: (O, I, height, width) of the prunable convolutions; those whose channels are no multiple of
            those of a block do not count.
        block: its output and input channels.
    """
    zeros, whole = 0, 0
    for weight in weights:
        groups = (weight == 0).flatten()[blocks(weight, block)]
        if groups.shape[1] == math.prod(block):
            zeros += int(groups.sum())
            whole += groups.shape[1] * int(groups.all(dim=1).sum())
    return zeros > 0 and whole >= _IN_BLOCKS_FROM * zeros
