"""Batches of images and targets for training and evaluation."""

from __future__ import annotations

import math
import multiprocessing.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sparse_exp.config.imgsz import Imgsz, sides
from sparse_exp.config.schema import AugmentConfig
from sparse_exp.data.augment import Example, augment_example, mix, paste_objects
from sparse_exp.data.detection import Sample
from sparse_exp.data.images import read_square
from sparse_exp.data.letterbox import Letterbox, fitted_size, letterbox_of
from sparse_exp.data.scan import in_threads
from sparse_exp.data.store import Squares, choose_store
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.progress import progress

_SHUFFLE, _AUGMENT = 0, 1  # part of the seeds, so that the two streams of random numbers are independent


class Batch(NamedTuple):
    """Images and their boxes.

    Attributes:
        images: uint8 RGB ``(N, 3, H, W)``.
        targets: float32 ``(M, 6)``: index of the image in the batch, class id, and x, y, w, h (centre and
            size) as shares of W and H.
    """

    images: Tensor
    targets: Tensor


def choose_workers(configured: int | None, store: str) -> int:
    """Number of processes that decode and augment.

    Args:
        configured: ``dataset.workers``; None chooses: 0 for a split that is kept in memory, else one for
            every two cores, at most 8. One core decodes and augments faster than two cores train even
            YOLOv5n, see benchmarks/data.py.
        store: see `sparse_exp.data.store.choose_store`.
    """
    if configured is not None:
        return configured
    return 0 if store == "ram" else min(8, max(1, usable_physical_cores() // 2))


# Bytes of a socket's path: those behind TMPDIR, /pymp-12345678/listener-12345678, and the most that
# Linux takes.
_SOCKET_PATH, _MOST_OF_SOCKET_PATH = 32, 107
Key = tuple[int, int, bool]
"""Epoch, index of an image, and whether it may become part of a mosaic."""


class DetectionImages(Dataset[Example]):
    """Letterboxed images of a split, each with its boxes in pixels.

    The key of an item is ``(epoch, index, mosaic)``. Augmentation depends only on these and the seed: any
    number of workers gives the same images. Without ``mosaic`` the item is not made of four images.

    Args:
        samples: images and labels.
        num_classes: class ids must be below it.
        imgsz: size that images are fitted into.
        seed: of the augmentation.
        augment: probabilities and strengths of the augmentation; None: no augmentation.
        store: where decoded images are kept: ``ram``, ``disk`` or ``none``.
        folder: for ``disk``: where files of decoded images are kept.

    Raises:
        DataError: an image or a label is damaged. For a split that is kept the constructor raises it, else
            the access to the item.
    """

    def __init__(
        self, samples: Sequence[Sample], num_classes: int, imgsz: Imgsz, seed: int = 0,
        augment: AugmentConfig | None = None, store: str = "ram", folder: Path | None = None,
    ) -> None:  # fmt: skip
        self._samples, self._num_classes, self._imgsz = samples, num_classes, imgsz
        self._seed, self._augment = seed, augment
        self._in_memory: list[Example] = []
        self._squares: Squares | None = None
        if store == "disk":
            assert folder is not None
            self._squares = Squares([sample.image for sample in samples], imgsz, folder)
        elif store == "ram":
            with progress("Reading images", total=len(self), unit="images") as bar:
                for example in in_threads(self._read, range(len(self))):
                    self._in_memory.append(example)
                    bar.advance()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key) -> Example:
        epoch, index, mosaic = key
        config = self._augment
        if config is None:
            return self._example(index)
        draw = np.random.default_rng((self._seed, _AUGMENT, epoch, index))
        if not (draw.random() < config.mosaic and mosaic):
            return augment_example([self._pasted(index, config, draw)], config, draw)
        example = self._mosaic(index, config, draw)
        if config.mixup and draw.random() < config.mixup:
            example = mix(example, self._mosaic(int(draw.integers(0, len(self))), config, draw), draw)
        return example

    def _mosaic(self, index: int, config: AugmentConfig, draw: np.random.Generator) -> Example:
        others = draw.integers(0, len(self), 3).tolist()
        pictures = [self._pasted(chosen, config, draw) for chosen in (index, *others)]
        return augment_example(pictures, config, draw)

    def _pasted(self, index: int, config: AugmentConfig, draw: np.random.Generator) -> Example:
        example = self._example(index)
        if not config.copy_paste:
            return example
        other = self._example(int(draw.integers(0, len(self))))
        return paste_objects(example, other, config.copy_paste, draw)

    def _example(self, index: int) -> Example:
        return self._in_memory[index] if self._in_memory else self._read(index)

    def _read(self, index: int) -> Example:
        sample = self._samples[index]
        if self._squares:
            square, size = self._squares[index]
            return self._labelled(sample, torch.from_numpy(square), letterbox_of(size, self._imgsz))
        pixels, mapping = read_square(sample.image, self._imgsz)
        return self._labelled(sample, torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), mapping)

    def _labelled(self, sample: Sample, planes: Tensor, mapping: Letterbox) -> Example:
        labels = sample.labels_of(self._num_classes)
        size = np.array(mapping.size, np.float32)
        centre, half = labels[:, 1:3] * size, labels[:, 3:5] * size / 2
        boxes = mapping.boxes(np.concatenate([centre - half, centre + half], axis=1))
        width, height = fitted_size(*mapping.size, self._imgsz)
        left, top = mapping.left, mapping.top
        picture = None if (height, width) == sides(self._imgsz) else (left, top, left + width, top + height)
        return Example(planes, torch.from_numpy(boxes), torch.from_numpy(labels[:, 0].copy()), picture)


class EpochSampler(Sampler[Key]):
    """Yields ``(epoch, index, mosaic)`` in an order that depends only on the seed and the epoch.

    Args:
        count: number of samples.
        seed: of the shuffling; None: no shuffling.
        batch_size: of whole batches; of use only with ``share``.
        share: (which, of how many) nearly equal parts of each batch to yield.

    Attributes:
        count: as given.
        seed: as given.
        epoch: of the next pass.
        skipped: number of samples to leave out at the beginning of the next pass, counted in this share.
        mosaic: of the next pass.
    """

    def __init__(
        self, count: int, seed: int | None, batch_size: int = 1, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.count, self.seed = count, seed
        self._batch_size, self._share = batch_size, share
        self.epoch = self.skipped = 0
        self.mosaic = True

    def __len__(self) -> int:
        return len(self._share_of(np.arange(self.count)))

    def __iter__(self) -> Iterator[Key]:
        order = np.arange(self.count)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, _SHUFFLE, self.epoch)).permutation(order)
        own = self._share_of(order)[self.skipped :]
        return iter([(self.epoch, int(index), self.mosaic) for index in own])

    def _share_of(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        which, of = self._share
        if of == 1:
            return order
        starts = range(0, len(order), self._batch_size)
        return np.concatenate(
            [np.array_split(order[start : start + self._batch_size], of)[which] for start in starts]
        )


class DetectionLoader(DataLoader[Example]):
    """A loader of `Batch` that knows its epoch; made by `make_loader`."""

    def set_epoch(self, epoch: int, skip: int = 0, *, mosaic: bool = True) -> None:
        """Choose the order and the augmentation of the next pass.

        Args:
            epoch: counted from 0.
            skip: number of batches to leave out at its beginning; they are not computed.
            mosaic: whether there are mosaics in it, as often as the augmentation says.
        """
        assert isinstance(self.sampler, EpochSampler)
        self.sampler.mosaic = mosaic
        self.sampler.epoch, self.sampler.skipped = epoch, skip * (self.batch_size or 1)

    def share(self, which: int, of: int) -> DetectionLoader:
        """A loader of one process's share of each batch; all shares in order make up this loader's batches.

        If the last batch of an epoch has fewer images than there are processes, the last processes get one
        batch less.

        Args:
            which: number of the process, from 0.
            of: number of processes; it divides the size of a batch. 1 gives this loader itself.
        """
        if of == 1:
            return self
        sampler, size = self.sampler, self.batch_size
        assert isinstance(sampler, EpochSampler)
        assert size is not None
        own = EpochSampler(sampler.count, sampler.seed, size, (which, of))
        return _loader(
            self.dataset, size // of, own, math.ceil(self.num_workers / of), pin_memory=self.pin_memory
        )

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle without the workers, which start again in the other process."""
        made = partial(_loader, pin_memory=self.pin_memory)
        return made, (self.dataset, self.batch_size, self.sampler, self.num_workers)


def _loader(
    images: Dataset[Example], batch_size: int, sampler: EpochSampler, workers: int, *, pin_memory: bool
) -> DetectionLoader:
    if workers:
        _make_room_for_sockets()
    return DetectionLoader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        # The platform's own: within joblib the default is joblib's, whose processes torch cannot start.
        multiprocessing_context=multiprocessing.get_all_start_methods()[0] if workers else None,
        pin_memory=pin_memory,
        collate_fn=collate,
        generator=torch.Generator(),  # else each pass would draw from torch's own, which the model uses
    )


def _make_room_for_sockets() -> None:
    """Make the folder in which workers put the sockets by which they hand over batches.

    It is this process's, which removes it at its end; workers are ended too early to remove folders of their
    own. Where the path of TMPDIR leaves no room for the path of a socket, it is in ``/tmp``, as Python 3.14
    has it.
    """
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) + _SOCKET_PATH > _MOST_OF_SOCKET_PATH:
        tempfile.tempdir = "/tmp"
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = usual


def make_loader(
    samples: Sequence[Sample], num_classes: int, *, imgsz: Imgsz, batch_size: int, train: bool, seed: int = 0,
    workers: int | None = None, augment: AugmentConfig | None = None, cache: str = "auto",
    folder: Path | None = None, pin_memory: bool = False, processes: int = 1,
) -> DetectionLoader:  # fmt: skip
    """Batches of a split.

    Args:
        samples: images and labels.
        num_classes: class ids must be below it.
        imgsz: size of the images.
        batch_size: images in a batch; the last batch may have fewer, and no image is dropped.
        train: whether to shuffle and augment.
        seed: of all randomness.
        workers: number of processes that decode and augment; 0: this one does; None: see `choose_workers`.
            The batches do not depend on it.
        augment: probabilities and strengths of the augmentation; of use only with ``train``.
        cache: where decoded images are kept; see `sparse_exp.data.store.choose_store`.
        folder: for ``disk``: where files of decoded images are kept.
        pin_memory: let batches lie where a GPU can fetch them while the CPU goes on.
        processes: that train together.

    Raises:
        DataError: an image or a label is damaged.
    """
    store = choose_store(cache, len(samples), imgsz, processes)
    images = DetectionImages(samples, num_classes, imgsz, seed, augment if train else None, store, folder)
    workers = choose_workers(workers, store)
    sampler = EpochSampler(len(images), seed if train else None)
    return _loader(images, batch_size, sampler, workers, pin_memory=pin_memory)


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples of one size into a `Batch`."""
    rows = []
    for position, (image, boxes, classes, _) in enumerate(examples):
        size = torch.tensor([image.shape[-1], image.shape[-2]])
        low, high = boxes[:, :2] / size, boxes[:, 2:] / size
        where = torch.full((len(boxes), 1), float(position))
        rows.append(torch.cat([where, classes[:, None], (low + high) / 2, high - low], dim=1))
    return Batch(torch.stack([example.image for example in examples]), torch.cat(rows))
