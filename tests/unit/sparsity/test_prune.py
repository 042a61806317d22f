from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparse_exp.sparsity.prune import prune_by_magnitude, prune_layer_adaptively


def layers(memory_format=torch.contiguous_format) -> dict[str, nn.Conv2d]:
    torch.manual_seed(0)
    made = {"a": nn.Conv2d(5, 7, 3), "b": nn.Conv2d(7, 11, 1), "c": nn.Conv2d(3, 4, 3)}
    made["b"].weight.data *= 50
    return {name: conv.to(memory_format=memory_format) for name, conv in made.items()}


def weights(convs) -> dict[str, np.ndarray]:
    return {name: conv.weight.detach().numpy().copy() for name, conv in convs.items()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.75, 0.999, 1.0])
def test_magnitude_zeroes_exactly_the_smallest_of_each_layer(sparsity, memory_format):
    convs = layers(memory_format)
    before = weights(convs)
    prune_by_magnitude(convs, sparsity)
    for name, after in weights(convs).items():
        count = math.ceil(sparsity * before[name].size)
        kept = np.sort(np.abs(before[name]).ravel())[count:]
        assert (after == 0).sum() == count
        np.testing.assert_array_equal(np.sort(np.abs(after[after != 0])), kept)
        np.testing.assert_array_equal(after[after != 0], before[name][after != 0])
    assert all(conv.weight.is_contiguous(memory_format=memory_format) for conv in convs.values())


def test_ties_are_broken_so_that_the_count_is_exact():
    conv = nn.Conv2d(4, 4, 1)
    nn.init.constant_(conv.weight, -0.5)
    prune_by_magnitude({"a": conv}, 0.5)
    assert int((conv.weight == 0).sum()) == 8


def test_pruned_weights_still_train():
    convs = layers()
    prune_by_magnitude(convs, 0.5)
    loss = convs["a"](torch.rand(1, 5, 4, 4)).square().sum()
    loss.backward()
    assert bool((convs["a"].weight.grad[convs["a"].weight == 0] != 0).any())


def lamp_reference(before: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Equation 3 of Lee et al. 2021, by its definition, one weight at a time."""
    scores = {}
    for name, weight in before.items():
        squares = weight.astype(np.float64).ravel() ** 2
        scores[name] = np.array([s / squares[squares >= s].sum() for s in squares])
    return scores


def test_adaptive_zeroes_the_lowest_scores_of_all_layers_together():
    convs = layers(torch.channels_last)
    before = weights(convs)
    scores = lamp_reference(before)
    prune_layer_adaptively(convs, 0.6)
    after = weights(convs)
    every = np.sort(np.concatenate(list(scores.values())))
    count = math.ceil(0.6 * len(every))
    assert sum(int((w == 0).sum()) for w in after.values()) == count
    for name, weight in after.items():
        np.testing.assert_array_equal(weight.ravel() == 0, scores[name] < every[count])
    shares = {name: float((w == 0).mean()) for name, w in after.items()}
    assert len(set(shares.values())) > 1


def test_adaptive_never_kills_a_layer():
    convs = layers()
    prune_layer_adaptively(convs, 0.98)
    assert all(bool((conv.weight != 0).any()) for conv in convs.values())


def test_adaptive_does_not_mind_the_scale_of_a_layer():
    plain, scaled = layers(), layers()
    scaled["a"].weight.data *= 1024
    prune_layer_adaptively(plain, 0.5)
    prune_layer_adaptively(scaled, 0.5)
    for name in plain:
        assert torch.equal(plain[name].weight == 0, scaled[name].weight == 0)
