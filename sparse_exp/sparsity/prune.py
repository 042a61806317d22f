"""One-shot pruning of a dense start checkpoint, of single weights or of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

BLOCK = 4
"""Weights in a block of the pattern ``block4``, which DeepSparse skips fastest with VNNI instructions."""
_TRAILING_BITS = 42  # of a float64, which its exponent and ten bits more stand before
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
    sizes = torch.cat([torch.full((len(of),), of.shape[1]) for of in groups.values()])
    doomed = _smallest(torch.cat(scores), sizes, math.ceil(sparsity * int(sizes.sum())))
    for (name, of), mine in zip(
        groups.items(), torch.split(doomed, [len(of) for of in groups.values()]), strict=True
    ):
        _zero(convolutions[name], of, mine)


def _smallest(scores: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The blocks with the smallest scores, as few as have ``count`` weights together.

    Of blocks with equal scores the first ones. Sorting them all takes half a minute at the size of yolov5l,
    of which only those near the limit matter: they are found by a histogram over the leading bits, in which
    floating-point numbers that are not negative stand in order.

    Args:
        scores: float64 (blocks,), not negative.
        sizes: int64 (blocks,): weights in each.
        count: weights wanted.

    Returns:
        bool (blocks,).
    """
    leading = scores.view(torch.int64) >> _TRAILING_BITS
    leading -= leading.min()
    mass = torch.bincount(leading, weights=sizes.double()).cumsum(0)
    limit = int(torch.searchsorted(mass, float(count)))
    doomed, near = leading < limit, (leading == limit).nonzero().flatten()
    near = near[scores[near].argsort(stable=True)]
    before = int(sizes[doomed].sum()) + sizes[near].cumsum(0) - sizes[near]
    doomed[near[before < count]] = True
    return doomed


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
