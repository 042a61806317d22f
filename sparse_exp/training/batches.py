"""A batch in parts, where a whole one would not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparse_exp.data.loader import Batch


def split_batch(batch: Batch, parts: int) -> Iterator[Batch]:
    """Cut a batch into parts of nearly equal size.

    Args:
        batch: images uint8 (N, 3, S, S) and targets (M, 6), whose first column is an index of images.
        parts: how many; at most N are made, each with at least one image.

    Yields:
        Batches whose targets count from their own first image.
    """
    first = 0
    for images in batch.images.tensor_split(min(parts, len(batch.images))):
        owner, last = batch.targets[:, 0], first + len(images)
        targets = batch.targets[(owner >= first) & (owner < last)].clone()
        targets[:, 0] -= first
        yield Batch(images, targets)
        first = last


class Buffers:
    """The buffers of a model as they are now, to go back to after a step that was cut off.

    A forward pass moves batch norm statistics and the ranges of quantizers; what ran out of memory
    half-way must not count twice.

    Args:
        model: looked at once, here.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers to what they were; observers' also get their former shapes."""
        for buffer, kept in self._kept:
            buffer.resize_(kept.shape).copy_(kept)
