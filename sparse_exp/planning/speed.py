"""Shares of zeros for a speed: of each layer as many as cost the least harm at a given speed-up.

Two tables are made and put together: how long the target's engine takes for each layer with more and more
zeros (`sparse_exp.benchmark.layer_times`), and what the network loses when one layer alone is pruned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_exp.benchmark.layer_times import SPARSITIES, LayerShape, LayerTimes, Table
from sparse_exp.config.imgsz import Imgsz, in_words, sides
from sparse_exp.config.runtimes import runs_quantized
from sparse_exp.config.schema import Experiment
from sparse_exp.data import DetectionDataset
from sparse_exp.errors import ConfigError, expected
from sparse_exp.export.exporter import export_dense_integer
from sparse_exp.export.onnx import FileForm, export_float
from sparse_exp.files import fingerprint
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.hardware.targets import no_speed_by_zeros
from sparse_exp.progress import progress
from sparse_exp.recipes.distillation import detection_distillation
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sources.cache import cache_directory
from sparse_exp.sparsity.prune import BLOCKS, Block, prune_by_magnitude
from sparse_exp.sparsity.shares import least_harm
from sparse_exp.training.oneshot import calibration_loader
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.yolov5.model import output_stride

_IMAGES, _BATCH = 16, 8  # on which harm is measured


@dataclass(frozen=True)
class SpeedShares:
    """Shares of zeros that were chosen for a speed-up.

    Attributes:
        shares: of each prunable convolution, 0..1, by its name.
        engine: that it holds for, with its version.
        load: how the engine was used, in words.
        dense_ms: measured time of the dense network for a batch, in ms.
        pruned_ms: time that the pruned network is to take.
    """

    shares: Mapping[str, float]
    engine: str
    load: str
    dense_ms: float
    pruned_ms: float

    def __str__(self) -> str:
        return (
            f"{self.dense_ms / self.pruned_ms:.2f} times as fast as dense is predicted: {self.pruned_ms:.1f} "
            f"instead of {self.dense_ms:.1f} ms in {self.engine} ({self.load})"
        )


def speed_shares(
    model: YOLOv5, experiment: Experiment, recipe: Recipe, dataset: DetectionDataset
) -> SpeedShares:
    """Choose the shares of zeros with which the target's first engine reaches ``model.speedup``.

    Of a recipe that quantizes layers are timed in int8, where the engine runs what is quantized here; the
    speed-up is that over the dense network in the same form. What the engine does besides prunable
    convolutions takes the same time with zeros as without.

    Args:
        model: the dense detector; left as it is.
        experiment: the checked configuration, fitted to this host.
        recipe: of the training.
        dataset: its training split has the calibration images.

    Raises:
        ConfigError: the engine does not skip zeros, or cannot become so fast; names the best that it can.
        SparseExpError: the engine cannot be had.
    """
    if refusal := no_speed_by_zeros(experiment.hardware):  # engines that are missing here are left out by now
        raise ConfigError(refusal)
    engine, imgsz = experiment.hardware.engines[0], experiment.dataset.imgsz
    convolutions = model.prunable_convolutions()
    images = list(_images(experiment, dataset))
    quantized = recipe.quantization_start is not None and runs_quantized(engine)
    table = table_of(experiment, quantized=quantized)
    times = LayerTimes(table, cache_directory(experiment.paths.cache) / "layer-times")
    shapes = {name: shape_of(name, conv, imgsz) for name, conv in convolutions.items()}
    layers = times.layers(shapes.values())
    form = FileForm(imgsz, experiment.export.opset)

    def export(file: Path) -> None:
        dense = copy.deepcopy(model).eval()
        if quantized:
            export_dense_integer(dense, file, images, form)
        else:
            export_float(dense, file, form)

    kind = fingerprint(model.size, model.num_classes, model.widths, imgsz)
    whole = times.network(kind, export, images[0])
    costs = [layers[shapes[name]] for name in convolutions]
    block = BLOCKS[experiment.recipe.pattern]
    harms = layer_harms(model, [torch.from_numpy(batch).float() / 255 for batch in images], block)
    found = choose(whole, costs, [harms[name] for name in convolutions], experiment)
    shares = {name: SPARSITIES[choice] for name, choice in zip(convolutions, found[0], strict=True)}
    cores = f"{table.cores} core{'s' if table.cores > 1 else ''}"
    load = f"{'int8' if quantized else 'fp32'}, batch {table.batch_size}, {cores}"
    return SpeedShares(shares, f"{engine} {times.version}", load, whole, found[1])


def table_of(experiment: Experiment, *, quantized: bool) -> Table:
    """How layers are measured for an experiment: in its first engine, under its first load."""
    hardware = experiment.hardware
    return Table(
        hardware.engines[0],
        hardware.batch_sizes[0],
        next(iter(hardware.cores), usable_physical_cores()),
        BLOCKS[experiment.recipe.pattern],
        quantized,
        hardware.pinning,
    )


def shape_of(name: str, conv: torch.nn.Conv2d, imgsz: Imgsz) -> LayerShape:
    """What the time of a detector's convolution depends on.

    Args:
        name: its published name.
        conv: the convolution.
        imgsz: size of the images.
    """
    height, width = (side // output_stride(name) * conv.stride[0] for side in sides(imgsz))
    kernel = conv.kernel_size[0], conv.kernel_size[-1]
    return LayerShape(conv.in_channels, conv.out_channels, kernel, conv.stride[0], conv.groups, height, width)


def choose(
    whole: float, times: Sequence[Sequence[float]], harms: Sequence[Sequence[float]], experiment: Experiment
) -> tuple[list[int], float]:
    """Choose for each layer how many zeros it gets.

    Args:
        whole: time of the dense network; what its layers do not take is not made faster.
        times: of each layer, dense and with more and more zeros, in the same unit. Where those of the dense
            layers add up to more than the whole, as layers can be slower alone, all are made smaller alike.
        harms: of the same.
        experiment: its ``model.speedup``.

    Returns:
        The index of each layer's choice, and the time of the network with them.

    Raises:
        ConfigError: it cannot become so fast; names the best.
    """
    dense = sum(layer[0] for layer in times)
    scale = min(1.0, whole / dense) if dense else 1.0
    times, rest = [[scale * time for time in layer] for layer in times], whole - scale * dense
    speedup = experiment.model.speedup or 1.0
    best = whole / max(1e-9, rest + sum(map(min, times)))
    if best < speedup:
        name, engine = experiment.model.name, experiment.hardware.engines[0]
        where = f"{name} at {in_words(experiment.dataset.imgsz)} px in {engine}"
        do = "Zeros make it no faster; take more by fewer channels (recipe.channels) or a smaller model."
        most = f"at most {math.floor(100 * best) / 100:.2f} for {where}"
        raise ConfigError(expected("model.speedup", most, speedup, do))
    chosen = least_harm(times, harms, max(whole / speedup - rest, sum(map(min, times))))
    return chosen, rest + sum(layer[choice] for layer, choice in zip(times, chosen, strict=True))


@torch.no_grad()
def layer_harms(model: YOLOv5, batches: Sequence[Tensor], block: Block = (1, 1)) -> dict[str, list[float]]:
    """What the network loses when one of its layers alone is pruned by magnitude.

    The loss is the distance of the raw predictions from those of the dense network
    (`sparse_exp.recipes.distillation.detection_distillation`): the start of a transfer may not know the
    classes of the images yet, so that their labels would say little of what it has learned.

    Args:
        model: the dense detector; it computes in evaluation mode, and stays as it is.
        batches: float images (N, 3, H, W) in 0..1.
        block: see `sparse_exp.sparsity.prune.blocks`.

    Returns:
        For each prunable convolution by name its harm at each of `SPARSITIES`, 0 or more, not falling.
    """
    convolutions = model.prunable_convolutions()
    sums = {name: np.zeros(len(SPARSITIES)) for name in convolutions}
    with (
        _evaluating(model),
        progress("Measuring harm", total=len(batches) * len(convolutions), unit="layers") as bar,
    ):
        for images in batches:
            dense = model(images)[1]
            for name, conv in convolutions.items():
                bar.advance(0, note=name)
                for number, sparsity in enumerate(SPARSITIES[1:], 1):
                    with _pruned(name, conv, sparsity, block):
                        sums[name][number] += float(detection_distillation(model(images)[1], dense, 1.0))
                bar.advance()
    images_of_all = sum(map(len, batches))
    return {
        name: np.maximum.accumulate(np.maximum(each / images_of_all, 0.0)).tolist()
        for name, each in sums.items()
    }


def _images(experiment: Experiment, dataset: DetectionDataset) -> Iterator[np.ndarray]:
    """Batches of calibration images, uint8 (N, 3, H, W)."""
    count = min(_IMAGES, experiment.recipe.calibration_images)
    imgsz, seed = experiment.dataset.imgsz, experiment.seed
    for batch in calibration_loader(dataset, count, imgsz=imgsz, batch_size=_BATCH, seed=seed):
        yield batch.images.contiguous().numpy()


@contextmanager
def _evaluating(model: YOLOv5) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _pruned(name: str, conv: torch.nn.Conv2d, sparsity: float, block: Block) -> Iterator[None]:
    """Let a layer have a share of zeros while the block runs."""
    weight = conv.weight.clone()
    prune_by_magnitude({name: conv}, sparsity, block)
    try:
        yield
    finally:
        conv.weight.copy_(weight)
