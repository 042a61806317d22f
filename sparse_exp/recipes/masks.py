"""Which weights magnitude pruning keeps: the masks of SparseML 1.8, bit for bit.

A score belongs to each weight, or to each group of weights that are pruned together. The share with the
smallest scores goes; of equal scores the first ones in memory order of the tensor stay.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

MaskType = str | Sequence[int]
"""``unstructured``: single weights. ``block4``: four consecutive input channels at one place of the kernel,
a rest of them alone. ``filter``: all weights of an output channel. ``[O, I]``: blocks of output and input
channels, which must divide the layer's; -1 stands for all of them."""
MASK_TYPES = ("unstructured", "block4", "filter")


def sparsity_of(tensor: Tensor) -> float:
    """Share of zeros, 0..1, computed in single precision."""
    return float((tensor == 0).sum().float() / float(tensor.numel()))


@torch.no_grad()
def magnitude_masks(
    parameters: Sequence[Tensor], targets: Sequence[float], mask_type: MaskType, *, together: bool = False
) -> list[Tensor]:
    """Masks that keep the weights with the largest magnitude.

    Args:
        parameters: weights (O, I, ...) or biases (O,).
        targets: share of zeros that each mask is to have, 0..1; 0 keeps everything.
        mask_type: what is pruned together.
        together: all parameters are ranked as one, to the first of the targets.

    Returns:
        bool tensors of the parameters' shapes, True where a weight is kept.

    Raises:
        ValueError: the blocks do not divide a parameter.
    """
    scores = [_scores(parameter.detach().abs(), mask_type) for parameter in parameters]
    if together:
        flat = _kept(torch.cat([score.reshape(-1) for score in scores]), targets[0])
        kept = [
            part.reshape(score.shape)
            for part, score in zip(torch.split(flat, [s.numel() for s in scores]), scores, strict=True)
        ]
    else:
        kept = [_kept(score, target) for score, target in zip(scores, targets, strict=True)]
    return [
        _expanded(mask, parameter.shape, mask_type) for mask, parameter in zip(kept, parameters, strict=True)
    ]


def group_size(mask_type: MaskType, shape: Sequence[int]) -> int:
    """Number of weights in a group that is pruned together, in a parameter of a shape (O, I, ...)."""
    if isinstance(mask_type, str):
        return {"block4": 4, "filter": math.prod(shape[1:])}.get(mask_type, 1)
    return math.prod(block_of(mask_type, shape))


def block_of(mask_type: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """The sides of a block in a parameter.

    Args:
        mask_type: output and input channels; -1 stands for all.
        shape: (O, I, ...) of the parameter.

    Raises:
        ValueError: the block does not divide the parameter, or this has less than two dimensions.
    """
    if len(shape) < 2:
        raise ValueError(f"a parameter of shape {list(shape)} has no blocks")
    out, into = (size if side == -1 else side for side, size in zip(mask_type, shape, strict=False))
    if shape[0] % out or shape[1] % into:
        raise ValueError(f"blocks of {list(mask_type)} do not divide a parameter of shape {list(shape)}")
    return out, into


def _kept(scores: Tensor, target: float) -> Tensor:
    """Where scores (any shape) are large enough to be kept: bool of the same shape."""
    count = scores.numel()
    if count < 1 or not 0.0 < target <= 1.0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat, pruned = scores.reshape(-1), round(count * target)
    threshold = torch.kthvalue(flat, max(pruned, 1)).values
    kept = flat > threshold
    tied = (flat == threshold).nonzero().flatten()
    if threshold > flat.min():
        surplus = count - int(kept.sum()) - pruned
        kept[tied[:surplus]] = True
    else:
        # More than enough weights are the smallest one, which is 0 where a start is sparser than the target.
        order = list(range(len(tied)))
        random.Random(42).shuffle(order)
        kept = torch.ones_like(kept)
        kept[tied[order[:pruned]]] = False
    return kept.reshape(scores.shape)


def _scores(magnitudes: Tensor, mask_type: MaskType) -> Tensor:
    """Scores of a parameter's groups."""
    if mask_type == "unstructured":
        return magnitudes
    if mask_type == "filter":
        if magnitudes.ndim < 2:
            raise ValueError(f"a parameter of shape {list(magnitudes.shape)} has no filters")
        dims = list(range(1, magnitudes.ndim))
        return cast(Tensor, torch.linalg.vector_norm(magnitudes, dim=dims, keepdim=True))
    if mask_type == "block4":
        return _by_input_channel(magnitudes).reshape(-1, 4).mean(1, keepdim=True)
    return magnitudes.reshape(_blocked(magnitudes.shape, mask_type)).mean(1, keepdim=True)


def _expanded(kept: Tensor, shape: torch.Size, mask_type: MaskType) -> Tensor:
    """Masks of groups, see `_scores`, as a mask of weights."""
    if mask_type == "unstructured":
        return kept
    if mask_type == "filter":  # a layer's only filter always stays
        return kept.expand(shape) if shape[0] > 1 else torch.ones(shape, dtype=torch.bool, device=kept.device)
    if mask_type != "block4":
        blocks = _blocked(shape, mask_type)
        return kept.reshape(blocks[0], 1, blocks[2]).expand(blocks).reshape(shape)
    last = shape[1] if len(shape) > 1 else shape[0]
    moved = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    mask = kept.expand(-1, 4).reshape(*moved, -1)[..., :last]
    return mask.movedim(-1, 1) if len(shape) > 2 else mask


def _by_input_channel(magnitudes: Tensor) -> Tensor:
    """A parameter with its input channels last, a rest of them filled up to four with its mean."""
    if magnitudes.ndim > 2:
        magnitudes = magnitudes.movedim(1, -1)
    rest = magnitudes.shape[-1] % 4
    if not rest:
        return magnitudes
    mean = magnitudes[..., -rest:].mean(-1, keepdim=True)
    filled = pad(magnitudes, (0, 4 - rest))
    filled[..., rest - 4 :] = mean
    return filled


def _blocked(shape: torch.Size, mask_type: MaskType) -> tuple[int, int, int]:
    """The shape (groups, weights in a group, groups beside it) into which a parameter is cut."""
    assert not isinstance(mask_type, str)
    out, into = block_of(mask_type, shape)
    if into > 1:
        return shape[0] * shape[1] // (out * into), out * into, math.prod(shape[2:])
    return shape[0] // out, out, math.prod(shape[1:])
