from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparse_exp.config.schema import PATTERNS
from sparse_exp.sparsity.measure import in_blocks
from sparse_exp.sparsity.prune import BLOCKS, blocks, prune_by_magnitude, prune_layer_adaptively
from sparse_exp.yolov5 import YOLOv5


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


def test_costs_divide_scores_and_counts_weigh_them():
    convs, costs, counts = layers(), {"a": 3, "b": 1, "c": 50}, {"a": 2, "b": 7, "c": 1}
    before = weights(convs)
    scores = {n: np.where(s < 1, s / costs[n], s) for n, s in lamp_reference(before).items()}
    prune_layer_adaptively(convs, 0.6, costs=costs, counts=counts)
    every = sorted((s, counts[n]) for n, own in scores.items() for s in own)
    wanted = math.ceil(0.6 * sum(count for _, count in every))
    counted = np.cumsum([count for _, count in every])
    limit = every[int(np.searchsorted(counted, wanted))][0]
    for name, weight in weights(convs).items():
        np.testing.assert_array_equal(weight.ravel() == 0, scores[name] <= limit)


@pytest.mark.parametrize("costs", [None, {"a": 1, "b": 1, "c": 10**6}])
def test_adaptive_never_kills_a_layer(costs):
    convs = layers()
    prune_layer_adaptively(convs, 0.98, costs=costs)
    assert all(bool((conv.weight != 0).any()) for conv in convs.values())


def test_adaptive_does_not_mind_the_scale_of_a_layer():
    plain, scaled = layers(), layers()
    scaled["a"].weight.data *= 1024
    prune_layer_adaptively(plain, 0.5)
    prune_layer_adaptively(scaled, 0.5)
    for name in plain:
        assert torch.equal(plain[name].weight == 0, scaled[name].weight == 0)


BOTH = pytest.mark.parametrize("prune", [prune_by_magnitude, prune_layer_adaptively])


def block_layers(memory_format=torch.contiguous_format) -> dict[str, nn.Conv2d]:
    torch.manual_seed(0)
    made = {"a": nn.Conv2d(8, 7, 3), "b": nn.Conv2d(12, 10, 1), "odd": nn.Conv2d(3, 4, 3)}
    return {name: conv.to(memory_format=memory_format) for name, conv in made.items()}


def block_norms(weight: np.ndarray) -> np.ndarray:
    """Squared norms (O, I / 4, height, width) of four consecutive input channels at one position."""
    return np.stack([(weight[:, first : first + 4] ** 2).sum(1) for first in range(0, weight.shape[1], 4)], 1)


@BOTH
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_block_of_every_pruned_layer_is_whole_or_zero(prune, memory_format):
    convs = block_layers(memory_format)
    before = weights(convs)
    prune(convs, 0.6, block=(1, 4))
    after = weights(convs)
    for name in ("a", "b"):
        whole = block_norms(before[name].astype(np.float64))
        zero = np.stack(
            [(after[name][:, k : k + 4] == 0).sum(1) for k in range(0, after[name].shape[1], 4)], 1
        )
        assert set(np.unique(zero)) == {0, 4}
        assert whole[zero == 4].max() < whole[zero == 0].min()  # within a layer the weakest blocks went
    assert (after["odd"] == 0).any()  # three input channels: single weights
    for name, weight in after.items():
        np.testing.assert_array_equal(weight[weight != 0], before[name][weight != 0])


def test_adaptive_blocks_reach_the_share_of_all_layers_together():
    convs = block_layers()
    total = sum(conv.weight.numel() for conv in convs.values())
    for sparsity in (0.0, 0.3, 0.5, 0.77):
        convs = block_layers()
        prune_layer_adaptively(convs, sparsity, block=(1, 4))
        zeros = sum(int((conv.weight == 0).sum()) for conv in convs.values())
        assert math.ceil(sparsity * total) <= zeros < math.ceil(sparsity * total) + 4


def test_adaptive_blocks_go_by_the_score_of_their_squared_norm():
    convs = {name: conv for name, conv in block_layers().items() if name != "odd"}
    before = weights(convs)
    norms = {name: block_norms(w.astype(np.float64)) for name, w in before.items()}
    scores = {name: lamp_reference({name: np.sqrt(norm)})[name] for name, norm in norms.items()}
    prune_layer_adaptively(convs, 0.5, block=(1, 4))
    every = np.sort(np.concatenate(list(scores.values())))
    limit = every[math.ceil(0.5 * len(every))]
    for name, weight in weights(convs).items():
        zero = block_norms(weight.astype(np.float64)) == 0
        np.testing.assert_array_equal(zero.ravel(), scores[name] < limit)


def test_blocks_are_those_of_sparseml():
    pytest.importorskip("sparseml", reason="it is there where the extra neuralmagic is installed")
    from sparseml.pytorch.sparsification.pruning.mask_creator import FourBlockMaskCreator

    torch.manual_seed(1)
    weight = torch.randn(6, 12, 3, 3).abs()
    (mask,) = FourBlockMaskCreator().create_sparsity_masks([weight], 0.5)
    whole = mask.flatten()[blocks(weight, (1, 4))].sum(1)
    assert set(whole.tolist()) == {0.0, 4.0}


def test_a_detector_pruned_in_blocks_has_no_partial_block():
    model = YOLOv5("n", 1)
    convolutions = model.prunable_convolutions()
    prune_layer_adaptively(convolutions, 0.75, block=(1, 4))
    for name, conv in convolutions.items():
        zeros = (conv.weight.flatten()[blocks(conv.weight, (1, 4))] == 0).sum(1)
        assert blocks(conv.weight, (1, 4)).shape[1] == 4, name
        assert set(zeros.tolist()) <= {0, 4}, name


@BOTH
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_blocks_of_output_channels_are_those_of_input_channels_of_the_transposed_layer(
    prune, size, memory_format
):
    torch.manual_seed(2)
    convs = {"a": nn.Conv2d(5, 16, 3), "b": nn.Conv2d(16, 24, 1), "odd": nn.Conv2d(16, 6, 1)}
    turned = {
        name: nn.Conv2d(conv.out_channels, conv.in_channels, conv.kernel_size) for name, conv in convs.items()
    }
    for name, conv in convs.items():
        conv.to(memory_format=memory_format)
        turned[name].weight.data = conv.weight.detach().transpose(0, 1).clone()
    before = weights(convs)
    prune(convs, 0.6, block=(size, 1))
    prune(turned, 0.6, block=(1, size))
    for name, weight in weights(convs).items():
        np.testing.assert_array_equal(weight, turned[name].weight.detach().transpose(0, 1).numpy())
        np.testing.assert_array_equal(weight[weight != 0], before[name][weight != 0])
    for name in ("a", "b"):
        whole = (convs[name].weight == 0).unflatten(0, (-1, size)).sum(1)
        assert set(whole.unique().tolist()) == {0, size}
    assert set((convs["odd"].weight == 0).sum(0).unique().tolist()) - {0, 6}  # six outputs: single weights


def test_each_pattern_has_its_block_and_each_divides_a_detector():
    assert tuple(BLOCKS) == PATTERNS
    model = YOLOv5("n", 1)
    for name, conv in model.prunable_convolutions().items():
        for out, into in BLOCKS.values():
            assert blocks(conv.weight, (out, into)).shape[1] == out * into, name


def test_zeros_in_blocks_are_told_from_single_ones():
    dense, whole, single = (torch.ones(2, 8, 3, 3) for _ in range(3))
    whole[0, 4:, 1, 1] = 0.0
    single[0, 3:7, 1, 1] = 0.0  # four in a row, but of two blocks
    stem = torch.zeros(2, 3, 3, 3)  # has no blocks
    assert in_blocks([dense, whole, stem])
    assert not in_blocks([single])
    assert not in_blocks([whole, single])
    assert not in_blocks([dense, stem])  # no zeros, so none in blocks
    assert not in_blocks([])
    across = torch.ones(8, 8, 3, 3)
    across[4:, 3, 1, 1] = 0.0  # four output channels
    assert in_blocks([across], BLOCKS["output_block4"])
    assert not in_blocks([across], BLOCKS["output_block8"])
    assert not in_blocks([across])
    many = torch.zeros(8, 64, 3, 3)
    assert in_blocks([many, single])  # 4 of 4612 zeros may be so by chance


@pytest.mark.parametrize("prune", [prune_by_magnitude, prune_layer_adaptively])
def test_a_weight_that_is_zero_by_chance_in_a_kept_block_is_not_held(prune):
    conv = nn.Conv2d(8, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[5.0] * 4 + [1.0] * 4, [5.0] * 4 + [1.0] * 4])[:, :, None, None])
        conv.weight[0, 1] = 0.0
    prune({"conv": conv}, 0.5, (1, 4))
    assert conv.weight[:, :4].ne(0).all()
    assert conv.weight[:, 4:].eq(0).all()
    assert abs(float(conv.weight[0, 1])) < 6e-8  # float16 would not tell it from 0
