from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_exp.data.loader import Batch
from sparse_exp.training.batches import Buffers, split_batch


def a_batch(owners: list[int], images: int) -> Batch:
    targets = torch.tensor([[owner, 7.0, 0.1, 0.2, 0.3, 0.4 + row] for row, owner in enumerate(owners)])
    return Batch(torch.arange(images, dtype=torch.uint8).view(-1, 1, 1, 1), targets.reshape(-1, 6))


@pytest.mark.parametrize(
    ("images", "parts", "sizes"), [(5, 2, [3, 2]), (4, 4, [1] * 4), (3, 8, [1] * 3), (6, 1, [6])]
)
def test_parts_are_of_nearly_equal_size_and_lose_no_image(images, parts, sizes):
    cut = list(split_batch(a_batch([], images), parts))
    assert [len(part.images) for part in cut] == sizes
    assert torch.cat([part.images for part in cut]).flatten().tolist() == list(range(images))


def test_boxes_stay_with_their_image_and_the_batch_is_left_alone():
    batch = a_batch([0, 2, 2, 3, 0], images=4)
    kept = batch.targets.clone()
    first, second = split_batch(batch, 2)
    assert first.targets[:, 0].tolist() == [0, 0]
    assert second.targets[:, 0].tolist() == [0, 0, 1]
    assert torch.equal(torch.cat([first.targets, second.targets])[:, 1:], kept[[0, 4, 1, 2, 3], 1:])
    assert torch.equal(batch.targets, kept)


def test_buffers_come_back_in_the_same_tensors():
    model = nn.BatchNorm2d(2)
    mean, buffers = model.running_mean, Buffers(model)
    model(torch.randn(4, 2, 3, 3))
    assert model.num_batches_tracked.item() == 1
    buffers.restore()
    assert model.running_mean is mean
    assert torch.equal(mean, torch.zeros(2))
    assert torch.equal(model.running_var, torch.ones(2))
    assert model.num_batches_tracked.item() == 0
