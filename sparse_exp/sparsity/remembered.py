"""What the modifiers of a recipe have done so far, as plain data, so that another process can go on.

SparseML's own ``state_dict`` holds the masks alone. Here everything that is data is kept: what has begun and
ended, when something was last updated, the masks, the scores of movement pruning, the counters of torch's
learning-rate schedulers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

_PARTS = ("sparseml.pytorch.sparsification.pruning.", "torch.optim.lr_scheduler")
_MASKS = "_param_masks"
_NO_DATA = object()


def remembered(modifiers: Sequence[Any]) -> list[dict[str, Any]]:
    """What each modifier knows: numbers, texts, tensors and containers of them, by dotted attribute names.

    Args:
        modifiers: initialized.

    Returns:
        A dict each; tensors are the modifiers' own, not copies, but for masks, which become bool.
    """
    return [dict(_data(modifier)) for modifier in modifiers]


@torch.no_grad()
def remember(modifiers: Sequence[Any], memory: Sequence[Mapping[str, Any]]) -> None:
    """Give modifiers what those of another process knew.

    Args:
        modifiers: of the same recipe, begun as far as they had begun there: their hooks and what they have
            built into the model must be there already.
        memory: of `remembered`.

    Raises:
        ValueError: there are more modifiers, or fewer.
        AttributeError: one lacks something that the other had.
    """
    for modifier, known in zip(modifiers, memory, strict=True):
        for name in known:
            owner, attribute = _owner(modifier, name)
            if attribute == "_enabled" and hasattr(owner, "_create_hooks"):
                owner.enabled = known[name]  # sets or removes the hooks that mask gradients
        for name, value in known.items():
            owner, attribute = _owner(modifier, name)
            setattr(owner, attribute, _in_place(getattr(owner, attribute), value))


def _data(thing: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(thing).items():
        if type(value).__module__.startswith(_PARTS):
            yield from _data(value, f"{prefix}{name}.")
        elif (data := _plain(value)) is not _NO_DATA:
            yield prefix + name, [mask.bool() for mask in data] if name == _MASKS else data


def _plain(value: Any) -> Any:
    """The value in types that ``torch.load`` reads with ``weights_only``; `_NO_DATA`: it is more."""
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
    *parts, attribute = name.split(".")
    return reduce(getattr, parts, modifier), attribute


def _in_place(now: Any, known: Any) -> Any:
    """What was known, in the tensors of now where they fit: these have the right type and memory layout."""
    if isinstance(known, Tensor) and isinstance(now, Tensor) and now.shape == known.shape:
        return now.copy_(known)
    if isinstance(known, list) and isinstance(now, list) and len(now) == len(known):
        return [_in_place(*pair) for pair in zip(now, known, strict=True)]
    return known
