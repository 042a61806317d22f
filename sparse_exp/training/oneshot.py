"""Apply a recipe at once: prune, and quantize with calibration, without training."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import torch

from sparse_exp.config.imgsz import Imgsz
from sparse_exp.data import DetectionDataset
from sparse_exp.data.loader import DetectionLoader, make_loader
from sparse_exp.errors import RecipeError, expected
from sparse_exp.recipes.checkpoints import CheckpointWriter
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sparsity.measure import SparsityContract, layer_sparsity, overall
from sparse_exp.training.evaluation import SMALLER, as_input
from sparse_exp.training.loop import TrainingData, TrainingResult
from sparse_exp.training.memory import no_memory_left
from sparse_exp.training.phases import Best
from sparse_exp.training.precision import Precision
from sparse_exp.training.start import Start
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.yolov5.checkpoint import mixes_classes

_CPU = torch.device("cpu")


def refuse_untrained_start(start: Start, names: Sequence[str]) -> None:
    """Refuse a start that does not know the classes, because a one-shot recipe would not train it.

    Args:
        start: as `load_start` made it.
        names: of the data set's classes.

    Raises:
        RecipeError: all weights are random, or those of the head: its checkpoint is for other classes. Or it
            has some of these classes in the places of others.
    """
    if start.untrained:
        raise RecipeError(
            "A one-shot recipe trains nothing, so its start must know the data set's classes already, but "
            f"{start.untrained} random. Give a checkpoint that was trained on these classes with "
            "model.weights=PATH, such as a dense run's weights/best_dense.pt."
        )
    has = start.checkpoint.names if start.checkpoint else ()
    if mixes_classes(has, names):
        should_be, got = (shorten(", ".join(each), 80) for each in (names, has))
        do = "A one-shot recipe trains nothing: give a checkpoint that was trained on these classes."
        raise RecipeError(expected("the classes of the start", should_be, got, do))


def calibration_loader(
    dataset: DetectionDataset, images: int, *, imgsz: Imgsz, batch_size: int, seed: int
) -> DetectionLoader:
    """A loader of images to calibrate quantization: a random choice of the training split, not augmented.

    Args:
        dataset: has a training split.
        images: number of images; at most all of the split are taken.
        imgsz: size of the images.
        batch_size: images in a batch.
        seed: of the choice.
    """
    samples = dataset.splits["train"]
    drawn = random.Random(seed).sample(range(len(samples)), min(images, len(samples)))
    picked = [samples[index] for index in drawn]
    return make_loader(picked, len(dataset.names), imgsz=imgsz, batch_size=batch_size, train=False)


def apply_at_once(
    model: YOLOv5,
    recipe: Recipe,
    data: TrainingData,
    precision: Precision,
    *,
    device: torch.device = _CPU,
    weights: Path,
    composed: str = "",
) -> TrainingResult:
    """Apply a recipe to a trained detector, evaluate it, and save it under the recipe's last phase.

    Args:
        model: changed in place.
        recipe: prunes to its final sparsities.
        data: quantization ranges are found on the images of ``train``; mAP is measured on ``val``.
        precision: its memory layout.
        device: that computes.
        weights: directory for the checkpoint.
        composed: the recipe that the checkpoint stores; "": ``recipe`` alone.

    Returns:
        A history of one record, at epoch 0, and the checkpoint.

    Raises:
        SparsityError: zeros of the start are gone, or a layer has fewer zeros than the recipe promises.
        RecipeError: a modifier cannot prune without training.
    """
    layout, phase, started = precision.memory_format, recipe.phases()[-1].name, time.perf_counter()
    convolutions = model.to(device).to(memory_format=layout).prunable_convolutions()
    start = {layer.name: layer.sparsity for layer in layer_sparsity(convolutions)}
    contract = SparsityContract.of(convolutions if recipe.prunes else {})
    with precision.on(device), no_memory_left("Applying the recipe", SMALLER):
        images = (as_input(batch.images.to(device, non_blocking=True), layout) for batch in data.train)
        recipe.apply_at_once(model, images)
    expected = recipe.expected_sparsity(model, recipe.epochs, start)
    contract.check(model.prunable_convolutions(), "after the recipe was applied", expected)
    result = data.val.evaluate_model(model, layout)
    record = {
        "phase": phase,
        "epoch": 0.0,
        "val/map50": result.map50,
        "val/map50_95": result.map50_95,
        "sparsity/prunable": overall(layer_sparsity(model.prunable_convolutions())),
        "seconds": time.perf_counter() - started,
    }
    promised = contract.promised(expected)
    writer = CheckpointWriter(weights, data.names, data.imgsz, composed or recipe.text)
    path = writer.save(f"best_{phase}.pt", model, phase, record, promised)
    return TrainingResult([record], {phase: Best(path, 0.0, result.map50, result.map50, promised)})
