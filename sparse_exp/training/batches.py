"""A batch in parts, where a whole one would not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparse_exp.data.loader import Batch
from sparse_exp.distributed.collectives import total_of


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


def no_images(imgsz: int) -> Batch:
    """A batch of none, of images that would be so large."""
    return Batch(torch.zeros(0, 3, imgsz, imgsz, dtype=torch.uint8), torch.zeros(0, 6))


def weighted_parts(batch: Batch, parts: int) -> list[tuple[Batch, float]]:
    """Cut a batch into parts, as many in each process that trains with this one.

    Args:
        batch: this process's share; it may be empty.
        parts: see `split_batch`.

    Returns:
        Each part with the number of images that all processes have in it. Where the others have more parts,
        those of this process are empty.
    """
    empty = Batch(batch.images[:0], batch.targets[:0])
    own = list(split_batch(batch, parts)) if len(batch.images) else []
    own += [empty] * (parts - len(own))
    counts = total_of([len(part.images) for part in own])
    return [(part, count) for part, count in zip(own, counts, strict=True) if count]


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
