"""A few real steps before the training: how long they take, and whether they fit into memory."""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sparse_exp.config.imgsz import Imgsz
from sparse_exp.config.schema import TrainerConfig
from sparse_exp.data.loader import Batch
from sparse_exp.errors import ConfigError
from sparse_exp.quantization.quantizers import release
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sparsity.measure import MEGABYTE
from sparse_exp.training.batches import split_batch
from sparse_exp.training.devices import choose_device, processes_on
from sparse_exp.training.evaluation import as_input
from sparse_exp.training.freezing import freeze
from sparse_exp.training.memory import (
    free_bytes,
    is_out_of_memory,
    peak_bytes,
    reset_peak,
    used_bytes,
)
from sparse_exp.training.optimizer import make_optimizer
from sparse_exp.training.precision import Precision
from sparse_exp.yolov5 import DetectionLoss, YOLOv5, non_max_suppression

_log = logging.getLogger(__name__)
FLOAT, QUANTIZED = "float", "quantized"
_T = TypeVar("_T")
_STEPS_PER_EPOCH = 1000  # so many that no step here is one in which gradual pruning goes on
_QUICK_S = 0.3  # steps that are quicker are timed again, three times in all: the first pays for set-up


@dataclass(frozen=True)
class Trial:
    """What a few steps showed; each mapping by kind of phase: `FLOAT`, `QUANTIZED`.

    Attributes:
        seconds: of one step of the optimizer, over a whole batch.
        evaluation: seconds of evaluating one image: its forward pass and suppression of overlapping boxes.
        peak_mb: highest use of memory by the process in MB of 1e6 bytes; nothing where it is not known.
        qat_split: parts that a batch is cut into while QAT runs, so that each fits into memory.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    qat_split: int = 1


def try_steps(
    model: YOLOv5,
    recipe: Recipe,
    batch: Batch,
    trainer: TrainerConfig,
    precision: Precision,
    imgsz: Imgsz,
    *,
    optimizer: str = "adamw",
    teacher: YOLOv5 | None = None,
) -> Trial:
    """Take one or a few steps of each kind that the recipe has, on a copy of the model.

    Before a full step one of a quarter of the batch tells what the full one will need; where that is
    more than there is, or the full step runs out of memory all the same, QAT takes the batch in two,
    four, eight ... parts.

    Args:
        model: the start of the training, pruned where it will be; it is not changed.
        recipe: the recipe; it is not attached to anything.
        batch: as the training will see them, of full size.
        trainer: hyper-parameters.
        precision: how floating-point phases compute.
        imgsz: size of the images.
        optimizer: see `RecipeConfig.optimizer`.
        teacher: for a recipe that distills; None where it is not there yet: the model stands in for it.

    Raises:
        ConfigError: a batch does not fit in floating point, or not even one image while QAT runs.
    """
    kinds = sorted({phase.quantized for phase in recipe.phases()})
    seconds, evaluation, peaks, split = {}, {}, {}, 1
    with _same_random_numbers(), precision.on(choose_device(trainer.device)):
        rig = _Rig(model, recipe, trainer, precision, imgsz, optimizer, teacher)
        for quantized in kinds:
            kind = QUANTIZED if quantized else FLOAT
            rig.enter(quantized=quantized)
            seconds[kind], peak, split = _fit(rig, batch, quantized=quantized)
            evaluation[kind] = rig.evaluate(batch)
            if peak is not None:
                peaks[kind] = peak / MEGABYTE
    return Trial(seconds, evaluation, peaks, split)


def images_that_fit(
    model: YOLOv5,
    recipe: Recipe,
    batch: Batch,
    trainer: TrainerConfig,
    precision: Precision,
    imgsz: Imgsz,
    *,
    least: int,
    optimizer: str = "adamw",
) -> int:
    """How many images of a batch fit into memory in a step in floating point: all, half, a quarter ...

    It is predicted from steps over a quarter of them; where even these run out of memory, from fewer.

    Args:
        model: of the training's architecture; it is not changed.
        recipe: see `try_steps`.
        batch: see `try_steps`.
        trainer: see `try_steps`.
        precision: see `try_steps`.
        imgsz: see `try_steps`.
        least: images below which nothing is tried.
        optimizer: see `RecipeConfig.optimizer`.
    """
    count: int = trainer.batch_size
    with _same_random_numbers():
        rig = _Rig(model, recipe, trainer, precision, imgsz, optimizer, None)
        rig.enter(quantized=False)
        while count > least:
            own = count // processes_on(rig.device, trainer.devices)
            each = _bytes_per_image(rig, _first(batch, own))
            if each is not None and own * each <= free_bytes(rig.device):
                break
            count //= 2
    return count


class _Rig:
    """A copy of everything that a training step touches."""

    def __init__(
        self,
        model: YOLOv5,
        recipe: Recipe,
        trainer: TrainerConfig,
        precision: Precision,
        imgsz: Imgsz,
        optimizer: str,
        teacher: YOLOv5 | None,
    ) -> None:
        self.device = choose_device(trainer.device)
        self._precision, self._trainer = precision, trainer
        self._model = copy.deepcopy(model).to(self.device).to(memory_format=precision.memory_format)
        freeze(self._model, trainer.freeze)
        self._optimizer = make_optimizer(self._model, trainer, optimizer)
        self._start = recipe.quantization_start or 0.0
        learns_from = copy.deepcopy(teacher or model).to(self.device) if recipe.distills else None
        self._sparsifier = recipe.attach(self._model, self._optimizer, _STEPS_PER_EPOCH, learns_from)
        self._loss = DetectionLoss(self._model.anchors, model.num_classes, trainer.loss, imgsz)
        self._epoch, self._autocast = 0.0, False

    def enter(self, *, quantized: bool) -> None:
        """Go to where phases of this kind begin."""
        self._epoch = self._start if quantized else 0.0
        self._autocast = self._precision.autocast and not quantized
        self._model.train()  # in evaluation mode torch would fold batch norms away
        self._sparsifier.before_step(self._epoch)

    @property
    def is_new(self) -> bool:
        """Whether no step was taken yet; the first one allocates the optimizer's state."""
        return not self._optimizer.state

    def step(self, batch: Batch, split: int) -> None:
        """One step of the optimizer, its batch in ``split`` parts."""
        self._model.train()
        self._optimizer.zero_grad()
        for part in split_batch(batch, split):
            self._backward(part)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._trainer.max_grad_norm)
        self._sparsifier.step(self._epoch)

    def evaluate(self, batch: Batch) -> float:
        """Seconds of evaluating one image: the forward pass, and what suppresses overlapping boxes."""
        part, trainer = _first(batch, _quarter(batch)), self._trainer
        self._model.eval()

        def detect() -> None:
            predictions = self._model(self._floats(part.images))[0].float().cpu().numpy()
            non_max_suppression(predictions, trainer.conf, trainer.iou, trainer.max_det)

        with torch.no_grad():
            seconds = _seconds(detect, self.device)
        return seconds / len(part.images)

    def forget(self) -> None:
        """Let go of what a step that was broken off holds."""
        release(self._model)
        self._optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _backward(self, part: Batch) -> None:
        images = self._floats(part.images)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            raw = self._model(images)
        loss, _ = self._loss(raw, part.targets.to(self.device))
        torch.autograd.backward(self._sparsifier.loss(loss, images, raw, self._epoch))

    def _floats(self, images: Tensor) -> Tensor:
        return as_input(images.to(self.device), self._precision.memory_format)


def _fit(rig: _Rig, batch: Batch, *, quantized: bool) -> tuple[float, int | None, int]:
    """Seconds and peak of a step over the batch, and the least number of parts in which it fits."""
    need, count, split = _needs(rig, batch), len(batch.images), 1
    while True:
        predicted, left = need(math.ceil(count / split)), free_bytes(rig.device)
        timed = _attempt(rig, partial(_timed, rig, batch, split)) if predicted <= left else None
        if timed:
            return (*timed, split)
        if not quantized or split >= count:
            raise _too_little(predicted, left, count, quantized=quantized)
        split = min(count, 2 * split)
        _log.info("A QAT step over %d images needs too much memory: it is split by %d.", count, split)


def _needs(rig: _Rig, batch: Batch) -> Callable[[int], float]:
    """Additional bytes as a function of the images in a step, from a step over a quarter of the batch.

    0 where it cannot be known: the quarter ran out of memory itself, or the host does not tell.
    """
    each = _bytes_per_image(rig, batch) or 0.0
    return lambda images: each * images


def _bytes_per_image(rig: _Rig, batch: Batch) -> float | None:
    """Additional bytes of a step for each image, from one over a quarter of the batch.

    In proportion: a little too much, as some of it (gradients) does not depend on the batch. 0 where the host
    does not tell; None: the quarter ran out of memory.
    """
    few = _quarter(batch)
    if rig.is_new:
        _attempt(rig, partial(rig.step, _first(batch, 1), 1))
    before = used_bytes(rig.device)
    reset_peak(rig.device)
    done = _attempt(rig, partial(_seconds, partial(rig.step, _first(batch, few), 1), rig.device))
    peak = peak_bytes(rig.device)
    if done is None:
        return None
    return 0.0 if peak is None else max(0, peak - before) / few


def _attempt(rig: _Rig, work: Callable[[], _T]) -> _T | None:
    """What the work returns; None if memory ran out meanwhile."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    rig.forget()  # not in the handler: there the traceback keeps the tensors of the broken step alive
    return None


def _timed(rig: _Rig, batch: Batch, split: int) -> tuple[float, int | None]:
    reset_peak(rig.device)
    seconds = _seconds(lambda: rig.step(batch, split), rig.device)
    for _ in range(2 if seconds < _QUICK_S else 0):
        seconds = min(seconds, _seconds(lambda: rig.step(batch, split), rig.device))
    return seconds, peak_bytes(rig.device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _too_little(predicted: float, left: float, count: int, *, quantized: bool) -> ConfigError:
    step = "a QAT step over 1 image" if quantized else f"a training step over {count} images"
    change = "dataset.imgsz smaller" if quantized else "trainer.batch_size or dataset.imgsz smaller"
    do = f"Make {change}, take a smaller model, or free some memory."
    if predicted > left:
        most, got = (
            f"at most the {left / MEGABYTE:.0f} MB that are free",
            f"about {predicted / MEGABYTE:.0f} MB",
        )
        return ConfigError(f"Expected the memory for {step} to be {most}, but got {got}. {do}")
    return ConfigError(f"Expected {step} to fit into memory, but it ran out of it. {do}")


def _quarter(batch: Batch) -> int:
    return max(1, len(batch.images) // 4)


def _first(batch: Batch, count: int) -> Batch:
    return Batch(batch.images[:count], batch.targets[batch.targets[:, 0] < count])


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Give every source of random numbers back as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
