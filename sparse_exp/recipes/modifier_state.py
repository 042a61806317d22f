"""The state of SparseML's modifiers as plain data, so that another process can continue a training.

SparseML's own ``state_dict`` holds only the masks. Here everything that is data is kept: which modifiers have
begun and ended, when they last updated something, masks, scores of movement pruning, and counters of torch's
learning-rate schedulers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

# Attributes of these types have states of their own.
_PARTS = ("sparseml.pytorch.sparsification.pruning.", "torch.optim.lr_scheduler")
_MASKS = "_param_masks"
_NO_DATA = object()


def modifier_states(modifiers: Sequence[Any]) -> list[dict[str, Any]]:
    """The state of each modifier: numbers, texts, tensors and containers of these, by dotted attribute names.

    Args:
        modifiers: initialized.

    Returns:
        One dict for each modifier. Its tensors are the modifier's own, not copies; masks become bool.
    """
    return [dict(_data_of(modifier)) for modifier in modifiers]


@torch.no_grad()
def restore_modifiers(modifiers: Sequence[Any], states: Sequence[Mapping[str, Any]]) -> None:
    """Bring modifiers into the state of another process's modifiers.

    Args:
        modifiers: of the same recipe. They must have begun as far as the others had, with the same hooks and
            the same changes to the model's structure.
        states: of `modifier_states`.

    Raises:
        ValueError: the numbers of modifiers differ.
        AttributeError: a modifier lacks an attribute that the other one had.
    """
    for modifier, state in zip(modifiers, states, strict=True):
        for name in state:
            owner, attribute = _owner(modifier, name)
            if attribute == "_enabled" and hasattr(owner, "_create_hooks"):
                owner.enabled = state[name]  # adds or removes the hooks that mask gradients
        for name, value in state.items():
            owner, attribute = _owner(modifier, name)
            setattr(owner, attribute, _restored(getattr(owner, attribute), value))


def _data_of(thing: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(thing).items():
        if type(value).__module__.startswith(_PARTS):
            yield from _data_of(value, f"{prefix}{name}.")
        elif (data := _plain(value)) is not _NO_DATA:
            yield prefix + name, [mask.bool() for mask in data] if name == _MASKS else data


def _plain(value: Any) -> Any:
    """The value in types that ``torch.load`` reads with ``weights_only``; `_NO_DATA` where it is no data."""
    if isinstance(value, Tensor):
        return _NO_DATA if isinstance(value, nn.Parameter) else value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if type(value) is dict:
        pairs = _plain(list(value.items()))
        return _NO_DATA if pairs is _NO_DATA else dict(pairs)
    if type(value) in (list, tuple):
        items = [_plain(item) for item in value]
        return _NO_DATA if any(item is _NO_DATA for item in items) else type(value)(items)
    return None if value is None else _NO_DATA


def _owner(modifier: Any, name: str) -> tuple[Any, str]:
    """The object that holds a dotted attribute, and the attribute's own name."""
    *parts, attribute = name.split(".")
    return reduce(getattr, parts, modifier), attribute


def _restored(current: Any, kept: Any) -> Any:
    """The kept value; tensors are copied into current ones, which have the right type and memory layout."""
    if isinstance(kept, Tensor) and isinstance(current, Tensor) and current.shape == kept.shape:
        return current.copy_(kept)
    if isinstance(kept, list) and isinstance(current, list) and len(current) == len(kept):
        return [_restored(*pair) for pair in zip(current, kept, strict=True)]
    return kept
