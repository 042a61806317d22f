"""Prune a dense start checkpoint at once: single weights, or blocks of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

Block = tuple[int, int]
"""Output and input channels of weights that are pruned together, at one position of the kernel."""
BLOCKS: Mapping[str, Block] = MappingProxyType(
    {"unstructured": (1, 1), "block4": (1, 4), "output_block4": (4, 1), "output_block8": (8, 1)}
)
"""By ``recipe.pattern``. DeepSparse skips blocks of input channels fastest with VNNI instructions; MNN has
kernels for blocks of output channels."""
_TRAILING_BITS = 42  # of a float64; before them stand its sign, its exponent and 10 bits of its fraction
_NEARLY_ZERO = 1e-8  # less than float16, the type of published checkpoints, can hold


@torch.no_grad()
def prune_by_magnitude(convolutions: Mapping[str, nn.Conv2d], sparsity: float, block: Block = (1, 1)) -> None:
    """Set the smallest weights of each layer to 0, in place: the same share in every layer.

    Args:
        convolutions: the layers to prune, by name.
        sparsity: share of each layer's weights that is 0 afterwards, 0..1, rounded up to whole blocks.
        block: weights that are pruned together, see `blocks`. Blocks with the smallest norm are
            pruned.
    """
    for conv in convolutions.values():
        groups = blocks(conv.weight, block)
        order = _squared_norms(conv.weight, groups).argsort(stable=True)
        pruned = torch.zeros(len(groups), dtype=torch.bool)
        pruned[order[: math.ceil(sparsity * len(groups))]] = True
        _set_to_zero(conv, groups, pruned)


@torch.no_grad()
def prune_layer_adaptively(
    convolutions: Mapping[str, nn.Conv2d],
    sparsity: float,
    block: Block = (1, 1),
    *,
    costs: Mapping[str, int] | None = None,
    counts: Mapping[str, int] | None = None,
) -> None:
    """Set the weights with the smallest layer-adaptive magnitude to 0, in place.

    The score of a weight is its square divided by the sum of all squares in its layer that are not smaller
    (LAMP, Lee et al. 2021, https://arxiv.org/abs/2010.07611). The largest weight of every layer has score 1,
    so that no layer loses all its weights, and layers that need their weights keep more of them. Pruned at
    once to the same overall sparsity, the detector loses less accuracy than with the same share in every
    layer. For a block, the squared norm takes the place of the weight's square.

    With costs, scores are divided by them: for the same harm those weights go first that cost most. The cost
    of a weight being its multiplications, a layer's score falls with the work of the whole layer, while it
    falls with the number of its weights alone where there are no costs.

    Args:
        convolutions: the layers to prune together, by name.
        sparsity: share of all their weights that is 0 afterwards, 0..1, rounded up to whole blocks.
        block: weights that are pruned together, see `blocks`.
        costs: of each of a layer's weights, at least 1, by the layer's name; None: all the same.
        counts: how often ``sparsity`` counts each of a layer's weights, at least 1; None: once.
    """
    groups = [blocks(conv.weight, block) for conv in convolutions.values()]
    scores = [
        _per_cost(_lamp_scores(_squared_norms(conv.weight, own)), costs[name] if costs else 1)
        for (name, conv), own in zip(convolutions.items(), groups, strict=True)
    ]
    sizes = torch.cat(
        [
            torch.full((len(own),), own.shape[1] * (counts[name] if counts else 1))
            for name, own in zip(convolutions, groups, strict=True)
        ]
    )
    pruned = _smallest(torch.cat(scores), sizes, math.ceil(sparsity * int(sizes.sum())))
    shares = torch.split(pruned, [len(own) for own in groups])
    for conv, own, share in zip(convolutions.values(), groups, shares, strict=True):
        _set_to_zero(conv, own, share)


def _smallest(scores: Tensor, sizes: Tensor, count: int) -> Tensor:
    """Find the blocks with the smallest scores: as few as have ``count`` weights together.

    Of blocks with equal scores the first ones are taken. Sorting all blocks of yolov5l would take half a
    minute, but only those near the limit need to be sorted. A histogram over the leading bits finds them:
    floating-point numbers that are not negative have the order of their bits.

    Args:
        scores: float64 (blocks,), not negative.
        sizes: int64 (blocks,): number of weights in each, or what they count.
        count: number of weights, or what they are to count together.

    Returns:
        bool (blocks,): True for the blocks found.
    """
    leading = scores.view(torch.int64) >> _TRAILING_BITS
    leading -= leading.min()
    weights_up_to = torch.bincount(leading, weights=sizes.double()).cumsum(0)
    limit = int(torch.searchsorted(weights_up_to, float(count)))
    found, near = leading < limit, (leading == limit).nonzero().flatten()
    near = near[scores[near].argsort(stable=True)]
    weights_before = int(sizes[found].sum()) + sizes[near].cumsum(0) - sizes[near]
    found[near[weights_before < count]] = True
    return found


def blocks(weight: Tensor, block: Block) -> Tensor:
    """Divide the weights of a convolution into blocks that are pruned together.

    A block spans consecutive output and input channels at one position of the kernel; the first begins at
    channel 0. If the channels of the layer are no multiple of those of a block (as in the stem, which reads
    three colours), blocks have one weight.

    Args:
        weight: (O, I, height, width).
        block: output and input channels of a block, at least 1 each.

    Returns:
        int64 (blocks, size): indices into the flattened weight.
    """
    out, into, height, width = weight.shape
    rows, columns = block if out % block[0] == 0 and into % block[1] == 0 else (1, 1)
    indices = torch.arange(weight.numel())
    cut = indices.view(out // rows, rows, into // columns, columns, height, width)
    return cut.permute(0, 2, 4, 5, 1, 3).reshape(-1, rows * columns)


def _squared_norms(weight: Tensor, groups: Tensor) -> Tensor:
    """Squared norm of each block, in double precision (blocks,)."""
    return weight.detach().flatten()[groups].double().square().sum(1)


def _lamp_scores(squared_norms: Tensor) -> Tensor:
    """Layer-adaptive magnitude of each block of one layer, 0..1 (blocks,)."""
    squares, order = squared_norms.sort(stable=True)
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares / not_smaller.clamp_min(torch.finfo(torch.float64).tiny)
    return scores


def _per_cost(scores: Tensor, cost: int) -> Tensor:
    """Scores divided by a cost, but for the largest, which is 1: no layer loses all its weights."""
    return torch.where(scores < 1.0, scores / cost, scores)


def _set_to_zero(conv: nn.Conv2d, groups: Tensor, pruned: Tensor) -> None:
    """Set the pruned blocks to 0, and see to it that no kept block holds a 0.

    The recipe's mask would hold a weight at 0 that is 0 by chance. Where blocks have more than one weight,
    such a weight gets a tiny value from which it can train.
    """
    flat = conv.weight.flatten().clone()  # in some memory layouts flatten returns a view
    kept = groups[~pruned].flatten()
    if groups.shape[1] > 1:
        flat[kept[flat[kept] == 0]] = _NEARLY_ZERO
    flat[groups[pruned].flatten()] = 0.0
    conv.weight.copy_(flat.view(conv.weight.shape))
