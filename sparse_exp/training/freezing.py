"""Layers that a training leaves as they are: their weights, and the statistics of their batch norms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sparse_exp.errors import ConfigError, expected
from sparse_exp.yolov5 import YOLOv5

_BACKBONE = 10  # modules, those before the neck


def freeze(model: YOLOv5, names: Sequence[str]) -> list[nn.BatchNorm2d]:
    """Let a training change nothing in some layers.

    Args:
        model: changed in place: parameters of these layers get no gradient any more.
        names: ``backbone``, or published names of modules such as ``model.0`` or ``model.2.cv1``, with all in
            them.

    Returns:
        Their batch norms, which stay in evaluation mode only where they are set to it after each change of
        the model's mode.

    Raises:
        ConfigError: there is no such module, or nothing would be left to train.
    """
    modules = dict(model.named_modules())
    chosen = [name for name in names if name != "backbone"]
    chosen += [f"model.{index}" for index in range(_BACKBONE)] if "backbone" in names else []
    if unknown := [name for name in chosen if name not in modules or not name]:
        do = "For example [backbone], or [model.0,model.2.cv1]."
        raise ConfigError(expected("trainer.freeze", "backbone or names of layers", unknown[0], do))
    frozen = [modules[name] for name in chosen]
    for module in frozen:
        module.requires_grad_(requires_grad=False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("trainer.freeze names all layers: nothing would be left to train. Name fewer.")
    inside = (norm for module in frozen for norm in module.modules())
    return [norm for norm in inside if isinstance(norm, nn.BatchNorm2d)]
