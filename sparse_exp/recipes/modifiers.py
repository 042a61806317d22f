"""Facts about the modifiers of a recipe, read from SparseML's objects without importing SparseML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import nn

from sparse_exp.errors import RecipeError
from sparse_exp.recipes.layer_patterns import layers_matching, matches_parameter, targets_of
from sparse_exp.recipes.schedule import Tagged, to_yaml


@dataclass(frozen=True)
class Phase:
    """A part of a training in which pruning and quantization do not change their state.

    Attributes:
        name: ``dense`` (nothing is pruned yet, or ever), ``pruning`` (the sparsity is rising) or
            ``pruned`` (zeros are held), followed by ``_quant`` where QAT runs. It is part of the name of the
            phase's checkpoint.
        start: first epoch; may be fractional.
        end: epoch at which it ends; may be fractional.
        quantized: whether QAT runs; then EMA and autocast are off.
    """

    name: str
    start: float
    end: float
    quantized: bool


def start_of(modifier: Any) -> float:
    """First epoch in which a modifier acts; SparseML's -1 stands for the beginning."""
    return max(0.0, float(modifier.start_epoch))


def gradual_of(manager: Any) -> list[Any]:
    """The modifiers of a manager that make zeros step by step while the model trains."""
    return [
        m
        for m in manager.iter_modifiers()
        if "Pruning" in type(m).__name__
        and not type(m).__name__.startswith("Constant")
        and m.end_epoch > start_of(m)
    ]


def holds(modifier: Any, layer: str, epoch: float, at: float = 0.0) -> bool:
    """Whether a modifier that keeps zeros holds a layer's zeros of one epoch at a later one.

    Args:
        modifier: a ConstantPruningModifier.
        layer: published name.
        epoch: the later epoch.
        at: the epoch at which the layer had the zeros.
    """
    names = any(matches_parameter(target, f"{layer}.weight") for _, target in targets_of(modifier))
    return names and start_of(modifier) <= at and (modifier.end_epoch < 0 or epoch <= modifier.end_epoch)


def group_size(modifier: Any) -> int:
    """Number of weights that a modifier prunes together."""
    kind = modifier.mask_type
    return 4 if kind == "block4" else math.prod(kind) if isinstance(kind, list) else 1


def check_blocks(modifier: Any, model: nn.Module, recipe: str) -> None:
    """Refuse blocks, given as a list, that do not divide a layer's output and input channels.

    Args:
        modifier: one that prunes.
        model: before quantization.
        recipe: its name, for the message.

    Raises:
        RecipeError: names the first layer that they do not divide.
    """
    block = getattr(modifier, "mask_type", None)
    if not isinstance(block, list):
        return
    names = {layer for target in targets_of(modifier) for layer in layers_matching(*target, model)}
    for name, layer in model.named_modules():
        shape = getattr(layer, "weight", torch.empty(0)).shape[:2]
        if name in names and any(
            sides > 0 and size % sides for size, sides in zip(shape, block, strict=False)
        ):
            raise RecipeError(
                f"{type(modifier).__name__} of {recipe} prunes blocks of {block}, which do not divide {name} "
                f"with its {list(shape)} channels. Leave that layer out of params, or set mask_type: block4."
            )


def overlaps(modifier: Any, phase: Phase) -> bool:
    """Whether a modifier begins in a phase, or began before and ends after the phase's start."""
    start = start_of(modifier)
    return phase.start <= start < phase.end or start < phase.start < modifier.end_epoch


def rates(modifier: Any, phase: Phase) -> tuple[float, float]:
    """First and last learning rate that a modifier sets within a phase; see `overlaps`."""
    end = phase.end if modifier.end_epoch < 0 else min(phase.end, modifier.end_epoch)
    return rate_at(modifier, max(phase.start, start_of(modifier))), rate_at(modifier, end)


def rate_at(modifier: Any, epoch: float) -> float:
    """The learning rate that a modifier sets at an epoch; for torch's own schedulers the initial one."""
    if not hasattr(modifier, "final_lr"):
        return float(modifier.learning_rate if hasattr(modifier, "learning_rate") else modifier.init_lr)
    if epoch <= start_of(modifier) or epoch >= modifier.end_epoch:
        return float(modifier.init_lr if epoch <= start_of(modifier) else modifier.final_lr)
    return float(getattr(modifier, f"_{modifier.lr_func}")(epoch, 1000))


def layer_pairs(
    modifier: Any, student: nn.Module, teacher: nn.Module, recipe: str
) -> tuple[tuple[str, str], ...]:
    """The pairs of layers, (student's, teacher's), of a per-layer distillation.

    Args:
        modifier: of a per-layer distillation. Where it names no layers, all convolutions are paired in order.
        student: the model in training.
        teacher: the model to learn from.
        recipe: its name, for the message.

    Raises:
        RecipeError: the numbers of layers differ.
    """
    own, other = modifier.student_layer_names, modifier.teacher_layer_names
    if own is None:
        own, other = (
            [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)] for model in (student, teacher)
        )
    if len(own) != len(other):
        raise RecipeError(
            f"{recipe} pairs {len(own)} layers of the student with {len(other)} of the teacher. "
            "Set student_layer_names and teacher_layer_names to lists of one length."
        )
    return tuple(zip(own, other, strict=True))


def recipe_text(manager: Any) -> str:
    """A manager's modifiers as YAML.

    SparseML's own writer cannot be used: it doubles each backslash of a pattern whenever it writes.
    """
    stages = manager.modifiers
    if isinstance(stages, list):
        return to_yaml({"modifiers": [_as_data(m) for m in stages]})
    return to_yaml({name: {f"{name}_modifiers": [_as_data(m) for m in own]} for name, own in stages.items()})


def _as_data(modifier: Any) -> Tagged:
    arguments = modifier.props(only_serializable=True)
    return Tagged(type(modifier).__name__, {name: _plain(value) for name, value in arguments.items()})


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, type):
        return value.__name__.lower()  # an observer's class, which the legacy modifier takes by this name
    return yaml.safe_load(str(value))  # a quantization scheme, whose text is YAML
