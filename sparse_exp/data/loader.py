"""Batches of images and targets for training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sparse_exp.config.schema import AugmentConfig
from sparse_exp.data.augment import Example, augment_example
from sparse_exp.data.detection import Sample
from sparse_exp.data.images import read_square
from sparse_exp.data.scan import in_threads
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.progress import progress

_CACHE_BYTES = 1 << 30  # a split that fits is decoded once and kept in memory
_SHUFFLE, _AUGMENT = 0, 1  # independent streams of random numbers


class Batch(NamedTuple):
    """Images and their boxes.

    Attributes:
        images: uint8 RGB ``(N, 3, S, S)``.
        targets: float32 ``(M, 6)``: image's position in the batch, class id, and x, y, w, h
            (centre and size) as shares of S.
    """

    images: Tensor
    targets: Tensor


def fits_in_memory(images: int, imgsz: int) -> bool:
    """Whether a split is decoded once and kept: at most 1 GiB, 873 images of 640 px or 3495 of 320 px."""
    return images * 3 * imgsz**2 <= _CACHE_BYTES


def choose_workers(configured: int | None, images: int, imgsz: int) -> int:
    """Processes that decode and augment.

    Args:
        configured: ``dataset.workers``; None: none for a split that is kept in memory, else one for
            every two cores, at most 8. A core decodes and augments faster than two of them train
            even YOLOv5n, see benchmarks/data.py.
        images: of the split.
        imgsz: side of the images, px.
    """
    if configured is not None:
        return configured
    return 0 if fits_in_memory(images, imgsz) else min(8, max(1, usable_physical_cores() // 2))


class DetectionImages(Dataset[Example]):
    """Letterboxed images of a split, each with its boxes in pixels.

    An item is asked for by ``(epoch, index)``: augmentation depends on these two and the seed, and
    on nothing else, so any number of workers gives the same images.

    Args:
        samples: images and labels.
        num_classes: class ids must be below it.
        imgsz: side of the square that images are scaled to, px.
        seed: of the augmentation.
        augment: probabilities and sizes of the augmentation; None for none.

    Raises:
        DataError: an image or a label is damaged; here if the split is small, else on reading.
    """

    def __init__(
        self, samples: Sequence[Sample], num_classes: int, imgsz: int, seed: int = 0,
        augment: AugmentConfig | None = None,
    ) -> None:  # fmt: skip
        self._samples, self._num_classes, self._imgsz = samples, num_classes, imgsz
        self._seed, self._augment = seed, augment
        self._kept: list[Example] = []
        if fits_in_memory(len(samples), imgsz):
            self._kept = self._read_all()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        epoch, index = key
        if self._augment is None:
            return self._example(index)
        draw = np.random.default_rng((self._seed, _AUGMENT, epoch, index))
        indices = [index]
        if draw.random() < self._augment.mosaic:
            indices += draw.integers(0, len(self), 3).tolist()
        return augment_example([self._example(chosen) for chosen in indices], self._augment, draw)

    def _example(self, index: int) -> Example:
        return self._kept[index] if self._kept else self._read(index)

    def _read_all(self) -> list[Example]:
        examples = []
        with progress("Reading images", total=len(self), unit="images") as bar:
            for example in in_threads(self._read, range(len(self))):
                examples.append(example)
                bar.advance()
        return examples

    def _read(self, index: int) -> Example:
        sample = self._samples[index]
        square, mapping = read_square(sample.image, self._imgsz)
        labels = sample.labels_of(self._num_classes)
        boxes = mapping.boxes(_corners(labels, *mapping.size))
        planes = torch.from_numpy(square).permute(2, 0, 1).contiguous()
        return Example(planes, torch.from_numpy(boxes), torch.from_numpy(labels[:, 0].copy()))


def _corners(labels: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """Label rows as x1, y1, x2, y2 in pixels, (M, 4)."""
    size = np.array([width, height], np.float32)
    centre, half = labels[:, 1:3] * size, labels[:, 3:5] * size / 2
    return np.concatenate([centre - half, centre + half], axis=1)


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields ``(epoch, index)``, in an order that is a function of seed and epoch.

    Args:
        count: number of samples.
        seed: of the shuffling; None keeps the order.
        batch_size: of the batches that are shared out; only looked at with ``share``.
        share: (which, of how many) nearly equal runs of each batch to yield.

    Attributes:
        epoch: of the next pass.
        skipped: samples at its beginning that are left out, of those that are yielded.
    """

    def __init__(
        self, count: int, seed: int | None, batch_size: int = 1, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.count, self.seed = count, seed
        self._batch_size, self._share = batch_size, share
        self.epoch = self.skipped = 0

    def __len__(self) -> int:
        return len(self._shared(np.arange(self.count)))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.count)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, _SHUFFLE, self.epoch)).permutation(order)
        return iter([(self.epoch, int(index)) for index in self._shared(order)[self.skipped :]])

    def _shared(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        which, of = self._share
        if of == 1:
            return order
        starts = range(0, len(order), self._batch_size)
        return np.concatenate(
            [np.array_split(order[start : start + self._batch_size], of)[which] for start in starts]
        )


class DetectionLoader(DataLoader[Example]):
    """A loader of `Batch` that knows its epoch; made by `make_loader`."""

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the order and the augmentation of the next pass.

        Args:
            epoch: counted from 0.
            skip: batches at its beginning that are left out, without being made.
        """
        assert isinstance(self.sampler, EpochSampler)
        self.sampler.epoch, self.sampler.skipped = epoch, skip * (self.batch_size or 1)

    def share(self, which: int, of: int) -> DetectionLoader:
        """A loader of one process's share of each batch; the shares in order are the batches of this one.

        Where the last batch has fewer images than there are processes, the last of them get one batch less.

        Args:
            which: process, counted from 0.
            of: processes; they divide the size of a batch. 1: this loader itself.
        """
        if of == 1:
            return self
        sampler, size = self.sampler, self.batch_size
        assert isinstance(sampler, EpochSampler)
        assert size is not None
        own = EpochSampler(sampler.count, sampler.seed, size, (which, of))
        return _loader(self.dataset, size // of, own, math.ceil(self.num_workers / of))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """A loader goes to another process without its workers, which start there anew."""
        return _loader, (self.dataset, self.batch_size, self.sampler, self.num_workers)


def _loader(
    images: Dataset[Example], batch_size: int, sampler: EpochSampler, workers: int
) -> DetectionLoader:
    return DetectionLoader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        generator=torch.Generator(),  # or each pass would draw from torch's own, which the model uses
    )


def make_loader(
    samples: Sequence[Sample], num_classes: int, *, imgsz: int, batch_size: int, train: bool, seed: int = 0,
    workers: int | None = None, augment: AugmentConfig | None = None,
) -> DetectionLoader:  # fmt: skip
    """Batches of a split.

    Args:
        samples: images and labels.
        num_classes: class ids must be below it.
        imgsz: side of the images, px.
        batch_size: images of a batch; the last one may have fewer, nothing is dropped.
        train: shuffle, and augment.
        seed: of everything random.
        workers: processes that decode and augment; 0: this one; None: see `choose_workers`. The
            batches are the same.
        augment: probabilities and sizes of the augmentation; ignored unless ``train``.

    Raises:
        DataError: an image or a label is damaged.
    """
    images = DetectionImages(samples, num_classes, imgsz, seed, augment if train else None)
    workers = choose_workers(workers, len(samples), imgsz)
    return _loader(images, batch_size, EpochSampler(len(images), seed if train else None), workers)


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples of one size into a `Batch`."""
    rows = []
    for position, (image, boxes, classes) in enumerate(examples):
        low, high = boxes[:, :2] / image.shape[-1], boxes[:, 2:] / image.shape[-1]
        where = torch.full((len(boxes), 1), float(position))
        rows.append(torch.cat([where, classes[:, None], (low + high) / 2, high - low], dim=1))
    return Batch(torch.stack([example.image for example in examples]), torch.cat(rows))
