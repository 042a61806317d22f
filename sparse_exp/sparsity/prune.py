"""One-shot pruning of a dense start checkpoint, of single weights or of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

BLOCK = 4
"""Weights in a block of the pattern ``block4``, which DeepSparse skips fastest with VNNI instructions."""
_NEARLY_ZERO = 1e-8  # below what float16 holds: published checkpoints are stored in it


@torch.no_grad()
def prune_by_magnitude(convolutions: Mapping[str, nn.Conv2d], sparsity: float, block: int = 1) -> None:
    """Set the smallest weights of each layer to 0, in place: the same share in every layer.

    Args:
        convolutions: the layers to prune.
        sparsity: share of each layer's weights that is 0 afterwards, 0..1, rounded up to whole blocks.
        block: weights that are pruned together, see `blocks`; of these those with the smallest norm go.
    """
    for conv in convolutions.values():
        groups = blocks(conv.weight, block)
        order = _energies(conv.weight, groups).argsort(stable=True)
        doomed = torch.zeros(len(groups), dtype=torch.bool)
        doomed[order[: math.ceil(sparsity * len(groups))]] = True
        _zero(conv, groups, doomed)


@torch.no_grad()
def prune_layer_adaptively(convolutions: Mapping[str, nn.Conv2d], sparsity: float, block: int = 1) -> None:
    """Set the weights with the smallest layer-adaptive magnitude to 0, in place.

    The score of a weight is its square over the sum of the squares in its layer that are not smaller
    (LAMP, Lee et al. 2021, https://arxiv.org/abs/2010.07611): the largest weight of every layer has
    score 1, so no layer dies, and layers that need their weights keep more of them. At one shot and
    equal overall sparsity it costs the detector less accuracy than the same share everywhere. Of a block
    the squared norm takes the place of the weight's square.

    Args:
        convolutions: the layers to prune, together.
        sparsity: share of all their weights that is 0 afterwards, 0..1, rounded up to whole blocks.
        block: weights that are pruned together, see `blocks`.
    """
    groups = {name: blocks(conv.weight, block) for name, conv in convolutions.items()}
    scores = [_lamp_scores(_energies(convolutions[name].weight, of)) for name, of in groups.items()]
    order = torch.cat(scores).argsort(stable=True)
    sizes = torch.cat([torch.full((len(of),), of.shape[1]) for of in groups.values()])[order]
    count = math.ceil(sparsity * int(sizes.sum()))
    doomed = torch.zeros(len(order), dtype=torch.bool)
    doomed[order[: int((sizes.cumsum(0) - sizes < count).sum())]] = True
    first = 0
    for name, of in groups.items():
        _zero(convolutions[name], of, doomed[first : first + len(of)])
        first += len(of)


def blocks(weight: Tensor, block: int) -> Tensor:
    """The weights of a convolution that are pruned together.

    A block is ``block`` consecutive input channels at one position of the kernel and one output channel,
    the first block beginning at channel 0. A layer whose input channels are no multiple of it (the stem,
    which reads three colours) has blocks of one weight.

    Args:
        weight: (O, I, height, width).
        block: weights in a block, at least 1.

    Returns:
        int64 (blocks, size): indices into the flattened weight.
    """
    out, channels, height, width = weight.shape
    size = block if channels % block == 0 else 1
    indices = torch.arange(weight.numel()).view(out, channels // size, size, height, width)
    return indices.permute(0, 1, 3, 4, 2).reshape(-1, size)


def _energies(weight: Tensor, groups: Tensor) -> Tensor:
    """Squared norm of each block, in double precision."""
    return weight.detach().flatten()[groups].double().square().sum(1)


def _lamp_scores(energies: Tensor) -> Tensor:
    """Layer-adaptive magnitude of each block of one layer, 0..1."""
    squares, order = energies.sort(stable=True)
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares / not_smaller.clamp_min(torch.finfo(torch.float64).tiny)
    return scores


def _zero(conv: nn.Conv2d, groups: Tensor, doomed: Tensor) -> None:
    """Set whole blocks to 0, and only whole ones.

    A weight that is 0 by chance in a block that stays would be held there by the recipe's mask; it gets a
    value from which it can train.
    """
    flat = conv.weight.flatten().clone()  # of some layouts flatten is a view
    kept = groups[~doomed].flatten()
    if groups.shape[1] > 1:
        flat[kept[flat[kept] == 0]] = _NEARLY_ZERO
    flat[groups[doomed].flatten()] = 0.0
    conv.weight.copy_(flat.view(conv.weight.shape))
