"""The quantizers of a model after quantization-aware training has begun: freeze, list, pin them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def published_name(name: str) -> str:
    """A layer's name in the published model, whether quantization has wrapped the layer or not."""
    return name.removesuffix(".module").replace(".module.", ".")


def freeze_quantizers(model: nn.Module) -> nn.Module:
    """Keep the quantization ranges as they are, as in a deployed model; returns the model itself."""
    return model.apply(torch.ao.quantization.disable_observer)


def is_quantized(state_names: Sequence[str]) -> bool:
    """Whether the names are those of a QAT model's state dict."""
    return any("fake_quant" in name or "activation_post_process" in name for name in state_names)


def quantized_layers(model: nn.Module) -> list[str]:
    """Published names of the layers whose weights are quantized."""
    return [
        published_name(name) for name, module in model.named_modules() if hasattr(module, "weight_fake_quant")
    ]


def pin_input_quantizer(model: nn.Module, stem: str) -> None:
    """Fix the quantizer of the input so that a pixel value v of 0..255 becomes exactly step v.

    An observer would find nearly this range by itself. With the exact range the exported graph reads uint8
    pixels without rounding them again.

    Args:
        model: a model after QAT has begun.
        stem: name of the first convolution, which reads images in 0..1.

    Raises:
        AttributeError: the stem's input has no quantizer.
    """
    quantizer: Any = model.get_submodule(f"{stem}.quant.activation_post_process")
    observer = quantizer.activation_post_process
    with torch.no_grad():
        quantizer.scale.fill_(1.0 / 255.0)
        quantizer.zero_point.fill_(quantizer.quant_min)
        quantizer.observer_enabled[0] = 0
        observer.min_val.fill_(0.0)
        observer.max_val.fill_(1.0)
