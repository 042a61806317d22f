"""One-shot pruning of a dense start checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def prune_by_magnitude(convolutions: Mapping[str, nn.Conv2d], sparsity: float) -> None:
    """Set the smallest weights of each layer to 0, in place: the same share in every layer.

    Args:
        convolutions: the layers to prune.
        sparsity: share of each layer's weights that is 0 afterwards, 0..1, rounded up to whole weights.
    """
    for conv in convolutions.values():
        flat = conv.weight.flatten()
        order = flat.abs().argsort(stable=True)
        _zero(conv, order[: math.ceil(sparsity * flat.numel())])


@torch.no_grad()
def prune_layer_adaptively(convolutions: Mapping[str, nn.Conv2d], sparsity: float) -> None:
    """Set the weights with the smallest layer-adaptive magnitude to 0, in place.

    The score of a weight is its square over the sum of the squares in its layer that are not smaller
    (LAMP, Lee et al. 2021, https://arxiv.org/abs/2010.07611): the largest weight of every layer has
    score 1, so no layer dies, and layers that need their weights keep more of them. At one shot and
    equal overall sparsity it costs the detector less accuracy than the same share everywhere.

    Args:
        convolutions: the layers to prune, together.
        sparsity: share of all their weights that is 0 afterwards, 0..1, rounded up to whole weights.
    """
    order = torch.cat([_lamp_scores(conv.weight) for conv in convolutions.values()]).argsort(stable=True)
    count = math.ceil(sparsity * len(order))
    doomed = torch.zeros(len(order), dtype=torch.bool)
    doomed[order[:count]] = True
    first = 0
    for conv in convolutions.values():
        last = first + conv.weight.numel()
        _zero(conv, doomed[first:last].nonzero().flatten())
        first = last


def _lamp_scores(weight: Tensor) -> Tensor:
    """Layer-adaptive magnitude of each weight, flat, 0..1, in double precision."""
    squares, order = weight.flatten().double().square().sort(stable=True)
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares / not_smaller.clamp_min(torch.finfo(torch.float64).tiny)
    return scores


def _zero(conv: nn.Conv2d, indices: Tensor) -> None:
    flat = conv.weight.flatten().clone()  # of some layouts flatten is a view
    flat[indices] = 0.0
    conv.weight.copy_(flat.view(conv.weight.shape))
