"""Cut a batch into parts, where the whole batch would not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparse_exp.config.imgsz import Imgsz, sides
from sparse_exp.data.loader import Batch
from sparse_exp.distributed.collectives import total_of


def split_batch(batch: Batch, parts: int) -> Iterator[Batch]:
    """Cut a batch into parts of nearly equal size.

    Args:
        batch: images uint8 (N, 3, S, S) and targets (M, 6), whose first column is the index of the image.
        parts: number of parts; at most N are made, each with at least one image.

    Yields:
        The parts; in each, targets count images from the part's first one.
    """
    first = 0
    for images in batch.images.tensor_split(min(parts, len(batch.images))):
        owner, last = batch.targets[:, 0], first + len(images)
        targets = batch.targets[(owner >= first) & (owner < last)].clone()
        targets[:, 0] -= first
        yield Batch(images, targets)
        first = last


def no_images(imgsz: Imgsz) -> Batch:
    """A batch without images.

    Args:
        imgsz: size of the images if there were any.
    """
    return Batch(torch.zeros(0, 3, *sides(imgsz), dtype=torch.uint8), torch.zeros(0, 6))


def weighted_parts(batch: Batch, parts: int) -> list[tuple[Batch, float]]:
    """Cut a batch into parts; all processes of a training get the same number of parts.

    Args:
        batch: this process's share of the batch; it may be empty.
        parts: see `split_batch`.

    Returns:
        Each part, and the number of images in this part of all processes. If other processes have more parts
        than this one, its last parts are empty.
    """
    empty = Batch(batch.images[:0], batch.targets[:0])
    own = list(split_batch(batch, parts)) if len(batch.images) else []
    own += [empty] * (parts - len(own))
    counts = total_of([len(part.images) for part in own])
    return [(part, count) for part, count in zip(own, counts, strict=True) if count]


class Buffers:
    """A copy of a model's buffers, to restore them after a step that was cut off.

    A forward pass updates batch norm statistics and the ranges of quantizers. When a step runs out of memory
    and is repeated, it must not update them twice; when its numbers are not finite, not at all.

    Args:
        model: its buffers are copied now.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers to the copies."""
        for buffer, kept in self._kept:
            buffer.copy_(kept)
