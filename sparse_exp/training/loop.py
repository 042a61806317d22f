"""The training loop: short, on Lightning Fabric, driven by the recipe."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.optim.swa_utils import AveragedModel

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.data.loader import Batch, DetectionLoader
from sparse_exp.errors import RecipeError, expected
from sparse_exp.progress import Bar, progress
from sparse_exp.sparsity.measure import SparsityContract, layer_sparsity, overall
from sparse_exp.sparsity.recipe import Phase, Recipe, pin_input_quantizer
from sparse_exp.training.evaluation import Evaluation, evaluate
from sparse_exp.training.precision import Precision
from sparse_exp.yolov5 import DetectionLoss, YOLOv5, save_checkpoint

_log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True)
class TrainingData:
    """What is trained and validated on.

    Attributes:
        train: augmented batches.
        val: batches of the validation split.
        names: class names.
        imgsz: side of the images in pixels.
    """

    train: DetectionLoader
    val: DetectionLoader
    names: tuple[str, ...]
    imgsz: int


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves.

    Attributes:
        history: one record per epoch (and per phase that ends within one).
        best: for each phase its best checkpoint.
    """

    history: list[Record]
    best: dict[str, Path]


class Trainer:
    """Trains one detector under one recipe.

    Args:
        model: start weights, already pruned where the recipe holds a mask.
        recipe: the SparseML recipe.
        data: loaders.
        config: hyper-parameters.
        precision: see `choose_precision`.
        weights: directory for checkpoints.
        seed: of everything random.
        on_epoch: called with each record of the history.
    """

    def __init__(
        self,
        model: YOLOv5,
        recipe: Recipe,
        data: TrainingData,
        config: TrainerConfig,
        precision: Precision,
        *,
        weights: Path,
        seed: int,
        on_epoch: Callable[[Record], None] = lambda _: None,
    ) -> None:
        seed_everything(seed, verbose=False)
        self._fabric = Fabric(devices=1)
        self.model, self._recipe, self._data = model, recipe, data
        self._config, self._precision = config, precision
        self._weights, self._on_epoch = weights, on_epoch
        self._model = model.to(self._fabric.device).to(memory_format=precision.memory_format)
        self._ema = AveragedModel(model, multi_avg_fn=_average(config.ema_decay), use_buffers=True)
        self._optimizer = _optimizer(model, config)
        self._loss = DetectionLoss(model.anchors, model.num_classes, config.loss, data.imgsz)
        # Weights of a dense checkpoint may be 0 by chance (float16 underflow): nobody promised those.
        promised = model.prunable_convolutions() if recipe.prunes else {}
        self._contract = SparsityContract.of(promised)
        self._phases = recipe.phases()
        self._best: dict[str, tuple[float, Path]] = {}
        self._quantizing = False

    def fit(self) -> TrainingResult:
        """Train to the end of the recipe.

        Raises:
            RecipeError: a phase is shorter than one step.
            SparsityError: a promised zero did not stay zero.
        """
        steps = len(self._data.train)
        sparsifier = self._recipe.attach(self._model, self._optimizer, steps)
        batches, history, done = self._batches(), [], 0
        total = max(1, round(self._recipe.epochs * steps))
        self._check_phases(steps)
        with progress("Training", total, "steps") as bar:
            for phase, end in self._segments(steps, total):
                self._enter(phase, sparsifier, done / steps)
                record = self._run(phase, range(done, end), steps, batches, sparsifier, bar)
                history.append({**record, **self._validate(phase, end / steps)})
                self._on_epoch(history[-1])
                bar.advance(0, note=_note(history[-1]))
                done = end
        sparsifier.finish()
        return TrainingResult(history, {name: path for name, (_, path) in self._best.items()})

    def _check_phases(self, steps: int) -> None:
        for phase in self._phases:
            if round(phase.end * steps) <= round(phase.start * steps):
                length = f"{phase.end - phase.start:g} epochs of {steps} steps"
                do = "Give it more of num_epochs, or more images."
                raise RecipeError(expected(f"the phase {phase.name}", "at least one step", length, do))

    def _segments(self, steps: int, total: int) -> Iterator[tuple[Phase, int]]:
        """Stretches of training that end with an evaluation: at each epoch, and where a phase ends."""
        ends = {min(total, epoch * steps) for epoch in range(1, math.ceil(total / steps) + 1)}
        for phase in self._phases:
            first, last = round(phase.start * steps), min(total, round(phase.end * steps))
            for end in sorted({end for end in ends if first < end < last} | {last}):
                if end > first:
                    yield phase, end

    def _enter(self, phase: Phase, sparsifier: Any, epoch: float) -> None:
        """Go on from the averaged weights when QAT begins: their average cannot follow its new modules."""
        if not phase.quantized or self._quantizing:
            return
        self._quantizing = True
        if epoch > 0:
            self._model.load_state_dict(self._ema.module.state_dict())
        sparsifier.before_step(epoch)
        pin_input_quantizer(self._model, self._model.stem)

    def _run(
        self,
        phase: Phase,
        steps: range,
        steps_per_epoch: int,
        batches: Iterator[Batch],
        sparsifier: Any,
        bar: Bar,
    ) -> Record:
        self._model.train()
        started, images, sums = time.perf_counter(), 0, dict.fromkeys(("box", "obj", "cls"), 0.0)
        for step in steps:
            batch, epoch = next(batches), step / steps_per_epoch
            if not self._recipe.sets_learning_rate:
                self._set_learning_rate(epoch)
            sparsifier.before_step(epoch)
            parts = self._step(batch, sparsifier, epoch, quantized=phase.quantized)
            images += len(batch.images)
            sums = {name: total + float(parts[name]) for name, total in sums.items()}
            bar.advance()
        seconds = time.perf_counter() - started
        return {
            "phase": phase.name,
            **{f"loss/{name}": total / len(steps) for name, total in sums.items()},
            "lr": self._optimizer.param_groups[0]["lr"],
            "images_per_s": images / seconds,
            "seconds": seconds,
        }

    def _step(self, batch: Batch, sparsifier: Any, epoch: float, *, quantized: bool) -> Mapping[str, Tensor]:
        images = self._floats(batch.images)
        autocast = self._precision.autocast and not quantized
        with torch.autocast(self._fabric.device.type, dtype=torch.bfloat16, enabled=autocast):
            raw = self._model(images)
        loss, parts = self._loss(raw, batch.targets)
        self._optimizer.zero_grad()
        self._fabric.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.max_grad_norm)
        sparsifier.step(epoch)
        if not quantized:
            self._ema.update_parameters(self._model)
        return parts

    def _validate(self, phase: Phase, epoch: float) -> Record:
        """Evaluate, hold the sparsity contract, and save."""
        model: YOLOv5 = self._model if phase.quantized else self._ema.module  # type: ignore[assignment]
        for candidate in (self._model, model):
            self._contract.check(candidate.prunable_convolutions(), f"after epoch {epoch:g}")
        result = evaluate_model(model, self._data.val, self._config, self._precision.memory_format)
        record = {
            "epoch": epoch,
            "val/map50": result.map50,
            "val/map50_95": result.map50_95,
            "sparsity/prunable": overall(layer_sparsity(model.prunable_convolutions())),
        }
        self._save(self._weights / "last.pt", model, phase, record)
        if phase.name not in self._best or result.map50 > self._best[phase.name][0]:
            path = self._weights / f"best_{phase.name}.pt"
            self._save(path, model, phase, record)
            self._best[phase.name] = (result.map50, path)
        return record

    def _save(self, path: Path, model: nn.Module, phase: Phase, record: Record) -> None:
        save_checkpoint(
            path,
            model_state=model.state_dict(),
            size=self.model.size,
            num_classes=self.model.num_classes,
            names=self._data.names,
            imgsz=self._data.imgsz,
            recipe=self._recipe.text,
            phase=phase.name,
            epoch=record["epoch"],
            metrics={name: value for name, value in record.items() if isinstance(value, float)},
        )

    def _batches(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            self._data.train.set_epoch(epoch)
            yield from self._data.train
            epoch += 1

    def _floats(self, images: Tensor) -> Tensor:
        return as_input(images.to(self._fabric.device), self._precision.memory_format)

    def _set_learning_rate(self, epoch: float) -> None:
        """The trainer's own schedule: linear warm-up, then cosine to a twentieth."""
        warmup, total = self._config.warmup, self._recipe.epochs
        if epoch < warmup:
            factor = max(0.01, epoch / warmup)
        else:
            share = (epoch - warmup) / max(1e-9, total - warmup)
            factor = 0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * factor


def as_input(images: Tensor, memory_format: torch.memory_format) -> Tensor:
    """uint8 images (N, 3, H, W) as the detector's input: float32 in 0..1."""
    return images.to(memory_format=memory_format).float().div_(255)


def evaluate_model(
    model: YOLOv5,
    loader: DetectionLoader,
    config: TrainerConfig,
    memory_format: torch.memory_format = torch.contiguous_format,
    **options: Any,
) -> Evaluation:
    """Measure mAP of a torch model on a loader's images; the model is in evaluation mode meanwhile."""
    was_training, device = model.training, next(model.parameters()).device
    observing = [m for m in model.modules() if isinstance(m, FakeQuantizeBase) and m.observer_enabled[0]]
    for quantizer in observing:  # images of the validation split must not move the ranges
        quantizer.disable_observer()
    model.eval()

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        output: tuple[Tensor, Any] = model(as_input(images.to(device), memory_format))
        return output[0].cpu()

    try:
        return evaluate(
            predict,
            loader,
            num_classes=model.num_classes,
            conf=config.conf,
            iou=config.iou,
            max_det=config.max_det,
            **options,
        )
    finally:
        model.train(was_training)
        for quantizer in observing:
            quantizer.enable_observer()


def _optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on convolution weights only, not on biases and batch norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def _average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential averaging that starts short, so that it means something on small data sets too."""

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        now = min(decay, (1.0 + float(count)) / (10.0 + float(count)))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1.0 - now)
        else:
            torch._foreach_copy_(averaged, current)

    return average


def _note(record: Record) -> str:
    return f"{record['phase']}, mAP50 {record['val/map50']:.3f}"
