"""The quantizers of a detector: put them in, switch them on, calibrate, freeze and list them.

They are there from the start of a training whose recipe quantizes, switched off: optimizer, averaged weights,
parallel processes and checkpoints never see a module replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_exp.quantization.modules import (
    QUANTIZED,
    QuantizedAdd,
    QuantizedBatchNorm2d,
    QuantizedConv2d,
    Quantizer,
)
from sparse_exp.quantization.scheme import LayerScheme, Schemes, folded_norms
from sparse_exp.yolov5.model import YOLOv5

_Read = tuple[str, int]  # a layer's name, and which of its inputs


def prepare(model: nn.Module, schemes: Mapping[str, LayerScheme]) -> nn.Module:
    """Put quantizers into a model, switched off. It computes as before, and its state dict does not change.

    Layers that read the same tensor in the same way share one quantizer.

    Args:
        model: changed in place; modules and parameters stay the same objects.
        schemes: what to quantize, by the layers' published names; empty: nothing is changed.

    Returns:
        The model itself.

    Raises:
        ValueError: the model has quantizers of other schemes already.
    """
    present = schemes_of(model)
    if present or not schemes:
        if present and schemes and present != dict(schemes):
            raise ValueError(
                "Expected a model without quantizers, or with the same, but got one with others."
            )
        return model
    norms, groups = folded_norms(model), _read_together(model, schemes)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = QuantizedBatchNorm2d  # in place: hooks and parameters stay where they are
            vars(module).update(folded=False, frozen=False)
    for name, scheme in schemes.items():
        _put_into(model.get_submodule(name), scheme)
        if name in norms:
            _connect(model.get_submodule(name), model.get_submodule(norms[name]))
    for readers in groups:
        _share(model, readers)
    device = next(model.parameters()).device
    for quantizer in quantizers(model).values():
        quantizer.to(device)
    return model.train(model.training)


def begin(model: nn.Module) -> nn.Module:
    """Switch rounding on, and let the ranges follow the training; that of the pixels is fixed.

    Args:
        model: see `prepare`.

    Returns:
        The model itself.
    """
    for quantizer in quantizers(model).values():
        quantizer.enabled = quantizer.observing = True
    for module in model.modules():
        if isinstance(module, QuantizedConv2d) and module.norm:
            module.norm[0].folded = True
    if stem := getattr(model, "stem", ""):
        pin_input_quantizer(model, stem)
    return model


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Find the ranges of a model that has just begun to round, as averages over some batches.

    Args:
        model: see `begin`; in the same mode afterwards. Nothing but its ranges changes.
        batches: float images (N, 3, H, W) in 0..1, on the model's device.
    """
    was_training, own = model.training, quantizers(model).values()
    model.eval()
    for quantizer in own:
        quantizer.calibrate(on=True)
    for images in batches:
        model(images)
    for quantizer in own:
        quantizer.calibrate(on=False)
    model.train(was_training)


def freeze_quantizers(model: nn.Module) -> nn.Module:
    """Keep the quantization ranges as they are, as in a deployed model; returns the model itself."""
    for quantizer in quantizers(model).values():
        quantizer.observing = False
    return model


def freeze_batch_norms(model: nn.Module) -> nn.Module:
    """Keep the statistics of all batch norms of a prepared model as they are; returns the model itself."""
    for module in model.modules():
        if isinstance(module, QuantizedBatchNorm2d):
            module.frozen = True
            module.train(module.training)
    return model


def release(model: nn.Module) -> None:
    """Let go of tensors that quantizers keep for further readers, after a step that was broken off."""
    for quantizer in quantizers(model).values():
        quantizer.release()


def pin_input_quantizer(model: nn.Module, stem: str) -> None:
    """Fix the quantizer of the input so that a pixel value v of 0..255 becomes exactly step v.

    An observer would find nearly this range by itself. With the exact range the exported graph reads uint8
    pixels without rounding them again.

    Args:
        model: see `begin`. Where its stem's input is left in floating point, nothing is changed.
        stem: name of the first convolution, which reads images in 0..1.
    """
    quantizer = model.get_submodule(stem)._modules.get("input_quantizer")
    if isinstance(quantizer, Quantizer):
        quantizer.set_range(0.0, 1.0)


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """All quantizers of a model, each once, by the name under which it is found first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def quantized_layers(model: nn.Module) -> list[str]:
    """Published names of the layers whose weights are quantized, whether that is switched on or not."""
    return [name for name, scheme in schemes_of(model).items() if scheme.weights]


def schemes_of(model: nn.Module) -> Schemes:
    """What of a model is quantized, by the layers' published names; empty without quantizers."""
    return {
        name: module.scheme
        for name, module in model.named_modules()
        if isinstance(module, tuple(QUANTIZED.values())) and hasattr(module, "scheme")
    }


def is_rounding(model: nn.Module) -> bool:
    """Whether the model has quantizers, and they are switched on."""
    return any(quantizer.enabled for quantizer in quantizers(model).values())


def is_quantized(state_names: Sequence[str]) -> bool:
    """Whether the names are those of a state dict with quantizers, ours or SparseML's."""
    return any(
        "quantizer" in name or "fake_quant" in name or "activation_post_process" in name
        for name in state_names
    )


def published_name(name: str) -> str:
    """A layer's name in the published model, where SparseML has wrapped the layer."""
    return name.removesuffix(".module").replace(".module.", ".")


def _put_into(module: Any, scheme: LayerScheme) -> None:
    """Give a published module its quantizers, and the class that uses them."""
    module.__class__ = QUANTIZED[type(module)]
    module.scheme = scheme
    if isinstance(module, QuantizedConv2d):
        module.norm = ()
        if scheme.weights:
            channels = module.out_channels if scheme.weights.per_channel else 1
            module.weight_quantizer = Quantizer(scheme.weights, channels, of_weight=True)
    if scheme.inputs and isinstance(module, QuantizedAdd):
        module.input_quantizers = nn.ModuleList(Quantizer(scheme.inputs) for _ in range(2))
    elif scheme.inputs:
        module.input_quantizer = Quantizer(scheme.inputs)
    if scheme.outputs:
        module.output_quantizer = Quantizer(scheme.outputs)


def _connect(conv: Any, norm: Any) -> None:
    """Let a quantized convolution fold in its batch norm, behind which its outputs are rounded."""
    if conv.scheme.weights:
        conv.norm = (norm,)  # in a tuple it is no part of the convolution, and keeps its name
    if conv.scheme.outputs:
        norm.output_quantizer = conv.output_quantizer
        del conv.output_quantizer


def _share(model: nn.Module, readers: Sequence[_Read]) -> None:
    """Let several layers read a tensor through the quantizer of the first of them."""
    shared = _input_quantizer(model, readers[0])
    shared.readers = len(readers)
    for name, index in readers[1:]:
        layer: Any = model.get_submodule(name)
        if isinstance(layer, QuantizedAdd):
            layer.input_quantizers[index] = shared
        else:
            layer.input_quantizer = shared


def _input_quantizer(model: nn.Module, read: _Read) -> Any:
    layer: Any = model.get_submodule(read[0])
    return layer.input_quantizers[read[1]] if isinstance(layer, QuantizedAdd) else layer.input_quantizer


@torch.no_grad()
def _read_together(model: nn.Module, schemes: Mapping[str, LayerScheme]) -> list[list[_Read]]:
    """Layers that read one tensor and round it in one way, found by running the model on a small image."""
    if not isinstance(model, YOLOv5):
        return []
    reads: list[tuple[Tensor, _Read]] = []

    def note(name: str) -> Any:
        return lambda _, inputs: reads.extend((tensor, (name, index)) for index, tensor in enumerate(inputs))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(note(name))
        for name, scheme in schemes.items()
        if scheme.inputs
    ]
    was_training = model.training
    model.eval()(torch.zeros(1, 3, 64, 64, device=model.anchors.device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    often = [read for _, read in reads]
    groups = defaultdict[tuple[int, Any], list[_Read]](list)
    for tensor, read in reads:
        if often.count(read) == 1:  # a module that is called several times reads several tensors
            groups[id(tensor), schemes[read[0]].inputs].append(read)
    return [group for group in groups.values() if len(group) > 1]
