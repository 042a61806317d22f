"""Quantizers of a model after quantization-aware training has begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparse_exp.sparsity.targets import published_name


def freeze_quantizers(model: nn.Module) -> nn.Module:
    """Stop observers from moving the quantization ranges, as in a deployed model."""
    return model.apply(torch.ao.quantization.disable_observer)


def is_quantized(state_names: Sequence[str]) -> bool:
    """Whether a state dict with these names is that of a QAT model."""
    return any("fake_quant" in name or "activation_post_process" in name for name in state_names)


def quantized_layers(model: nn.Module) -> list[str]:
    """Published names of the layers whose weights are quantized."""
    return [
        published_name(name) for name, module in model.named_modules() if hasattr(module, "weight_fake_quant")
    ]


def pin_input_quantizer(model: nn.Module, stem: str) -> None:
    """Quantize the images exactly as they are stored: value v of 0..255 to step v, no more, no less.

    An observer would find nearly this range by itself; the exact one makes the exported graph read
    uint8 pixels without rounding them again.

    Args:
        model: a model after QAT has begun.
        stem: name of the first convolution, which reads images in 0..1.
    """
    quantizer: Any = model.get_submodule(f"{stem}.quant.activation_post_process")
    observer = quantizer.activation_post_process
    with torch.no_grad():
        quantizer.scale.fill_(1.0 / 255.0)
        quantizer.zero_point.fill_(quantizer.quant_min)
        quantizer.observer_enabled[0] = 0
        observer.min_val.fill_(0.0)
        observer.max_val.fill_(1.0)
