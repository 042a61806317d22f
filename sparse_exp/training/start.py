"""The start of a training: the detector with its start weights, pruned where the plan says so."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch

from sparse_exp.config.schema import Experiment, RecipeConfig
from sparse_exp.data.detection import DetectionDataset, box_sides
from sparse_exp.errors import CheckpointError, ConfigError, expected
from sparse_exp.metrics.anchors import LEAST_RECALL, best_possible_recall, fit_anchors
from sparse_exp.quantization.from_sparseml import published_state
from sparse_exp.quantization.quantizers import is_quantized
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sources.start import SCRATCH, StartFile
from sparse_exp.sparsity.measure import (
    SPARSE_FROM,
    layer_sparsity,
    listed,
    overall,
    total_macs,
    work_sparsity,
)
from sparse_exp.sparsity.prune import BLOCKS, prune_by_magnitude, prune_layer_adaptively
from sparse_exp.sparsity.slimming import choose_channels, weight_scores
from sparse_exp.yolov5 import Checkpoint, TransferReport, YOLOv5, read_checkpoint, transfer_weights
from sparse_exp.yolov5.channels import build_detector, keep_channels
from sparse_exp.yolov5.checkpoint import in_order_of, mixes_classes
from sparse_exp.yolov5.grow import grow
from sparse_exp.yolov5.model import STRIDES, output_stride

_MOST_ZEROS = 0.99  # as of model.sparsity
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The weights that a training starts from, as far as they are known.

    Attributes:
        origin: where they come from, ``grown:...``, or ``scratch``.
        sparsity: share of zeros in the prunable convolutions, 0..1; None: not known, as the checkpoint is not
            on this machine yet.
        quantized: whether the checkpoint's weights went through QAT; its ranges are not taken.
        left: names of the tensors that the checkpoint does not fill; they keep their initial values.
        grown_from: origin of the smaller checkpoint that the start is grown from; "" where it is not.
        checkpoint: what its file holds, as far as it is grown after that; None for ``scratch``.
        report: which tensors were taken; None for ``scratch``.
    """

    origin: str
    sparsity: float | None
    quantized: bool = False
    left: tuple[str, ...] = ()
    grown_from: str = ""
    checkpoint: Checkpoint | None = None
    report: TransferReport | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether it is known to be pruned."""
        return self.sparsity is not None and self.sparsity >= SPARSE_FROM

    @property
    def untrained(self) -> str:
        """What is random in these weights, as the beginning of a sentence; empty where nothing is."""
        if self.left:
            return f"{listed(self.left)} of the start ({self.origin}) are"
        return "" if self.checkpoint else "the start is"

    @property
    def transferred(self) -> str:
        """How many tensors were taken, in words."""
        return f"{self.report.taken} of {self.report.total} tensors" if self.report else "none"


def load_start(file: StartFile | None, size: str, names: Sequence[str], *, seed: int) -> tuple[YOLOv5, Start]:
    """Build the detector and give it the start weights.

    Args:
        file: the start checkpoint; None: random weights.
        size: of the detector, one of `sparse_exp.config.schema.SIZES`.
        names: of the data set's classes. Where the checkpoint names the same ones in another order, its class
            scores are put into this one.
        seed: of the initial weights of what is not taken, and of the noise in a start that is grown.

    Returns:
        The detector, and how its weights came into it. Of a quantized checkpoint the weights and batch norms
        are taken, as they are in floating point; its quantizers are left out.

    Raises:
        CheckpointError: the file cannot be read, or is of another architecture.
    """
    torch.manual_seed(seed)
    num_classes = len(names)
    if file is None:
        model = YOLOv5(size, num_classes)
        return model, Start(SCRATCH, overall(layer_sparsity(model.prunable_convolutions())))
    checkpoint = read_checkpoint(file.file.path)
    quantized = is_quantized(list(checkpoint.state_dict))
    if quantized:
        _log.info("The start (%s) is quantized: its weights are taken in floating point.", file.file.origin)
        checkpoint = _in_floating_point(checkpoint)
    if file.grown:
        checkpoint = grow(checkpoint, size, seed=seed)
    ordered = in_order_of(checkpoint, names)
    if ordered is not checkpoint:
        _log.info("The classes of %s are the data set's in another order: they are put into it.", file.name)
        checkpoint = ordered
    grown_from = file.file.origin if file.grown else ""
    model = build_detector(size, num_classes, checkpoint.widths if checkpoint.size == size else None)
    report = transfer_weights(model, checkpoint)
    sparsity = overall(layer_sparsity(model.prunable_convolutions()))
    return model, Start(file.name, sparsity, quantized, report.left, grown_from, checkpoint, report)


@dataclass(frozen=True)
class Anchors:
    """How well a detector's anchors suit the training boxes.

    Attributes:
        before: share of the boxes that an anchor of the start answers for, 0..1.
        recall: the same with the anchors that are trained with.
        fitted: whether these were fitted to the boxes.
    """

    before: float
    recall: float
    fitted: bool


def suit_anchors(model: YOLOv5, dataset: DetectionDataset, experiment: Experiment) -> Anchors:
    """Compare the start's anchors with the training boxes, and fit others where the configuration says so.

    Args:
        model: with the start weights; gets other anchors where ``model.anchors=auto``, the start's answer for
            less than 98 % of the boxes, and the new ones answer for more; not where nothing is trained.
        dataset: its training split.
        experiment: its image size, ``anchor_t`` and seed.

    Raises:
        ConfigError: the start is to teach, and its anchors would be others.
    """
    sides = box_sides(dataset.splits["train"], experiment.dataset.imgsz)
    anchor_t = experiment.trainer.loss.anchor_t
    strides = np.array(STRIDES, np.float64).reshape(-1, 1, 1)
    before = best_possible_recall(sides, model.anchors.cpu().numpy() * strides, anchor_t)
    if experiment.model.anchors != "auto" or experiment.recipe.oneshot or before >= LEAST_RECALL:
        return Anchors(before, before, fitted=False)
    found = fit_anchors(sides, anchor_t, experiment.seed)
    recall = best_possible_recall(sides, found, anchor_t)
    if recall <= before:
        return Anchors(before, before, fitted=False)
    if experiment.recipe.teacher == "self":
        raise ConfigError(
            "recipe.teacher=self teaches with the anchors of the start, and model.anchors=auto fits others. "
            "Use recipe.teacher=baseline with recovery.baseline=auto, or set model.anchors=start."
        )
    with torch.no_grad():
        model.anchors.copy_(torch.from_numpy(found / strides))
    _log.info("Anchors fitted to the training boxes answer for %.1f %% of them (before: %.1f %%).",
              100 * recall, 100 * before)  # fmt: skip
    return Anchors(before, recall, fitted=True)


def _in_floating_point(checkpoint: Checkpoint) -> Checkpoint:
    """A quantized checkpoint without its quantizers."""
    model = build_detector(checkpoint.size, checkpoint.num_classes, checkpoint.widths)
    return replace(checkpoint, state_dict=published_state(checkpoint.state_dict, model), quantization={})


def slim_start(model: YOLOv5, recipe: Recipe, config: RecipeConfig) -> None:
    """Take channels out of the start by its weights alone, for a recipe that takes none out itself.

    Args:
        model: changed in place.
        recipe: of the training.
        config: its ``channels``: the share of the multiplications that stays; None: all channels stay.

    Raises:
        ConfigError: so little cannot stay.
    """
    if config.channels is None or recipe.slimming:
        return
    kept = choose_channels(model, weight_scores(model), config.channels)
    before = total_macs(model.quantizable_convolutions(), STRIDES[-1])
    keep_channels(model, kept)
    left = total_macs(model.quantizable_convolutions(), STRIDES[-1]) / before
    _log.info("Took channels out of the start: %.1f %% of its multiplications are left.", 100 * left)


def prune_start(
    model: YOLOv5,
    sparsity: float | None,
    config: RecipeConfig,
    macs: float | None = None,
    shares: Mapping[str, float] | None = None,
) -> None:
    """The pruning step that the plan inserted, if it did.

    Args:
        model: pruned in place.
        sparsity: share of zeros in its prunable convolutions, 0..1; None for no such step.
        config: its ``pattern`` and ``shares``.
        macs: share of the multiplications that are to meet no zero, above 0 and at most 1, instead of
            ``sparsity``; see `zeros_for_work`.
        shares: share of zeros of each prunable convolution, 0..1, by its name, instead of both.

    Raises:
        ConfigError: see `zeros_for_work`.
    """
    if sparsity is None:
        return
    convolutions, block = model.prunable_convolutions(), BLOCKS[config.pattern]
    work = {name: (STRIDES[-1] // output_stride(name)) ** 2 for name in convolutions}
    share = sparsity if macs is None else zeros_for_work(model, macs)
    if shares is not None:
        for name, conv in convolutions.items():
            prune_by_magnitude({name: conv}, shares[name], block)
    elif config.shares == "uniform":
        prune_by_magnitude(convolutions, share, block)
    else:
        costs = work if config.shares == "work" else None
        prune_layer_adaptively(convolutions, share, block, costs=costs, counts=work if macs else None)
    layers = layer_sparsity(model.quantizable_convolutions())
    _log.info(
        "Pruned the dense start to %.2f %% zeros, which %.1f %% of its multiplications meet (%s, %s shares).",
        100 * overall(layer_sparsity(convolutions)),
        100 * work_sparsity(layers),
        config.pattern,
        config.shares,
    )


def zeros_for_work(model: YOLOv5, macs: float) -> float:
    """The share of the prunable convolutions' work that must meet zeros for a share of all work to remain.

    Args:
        model: the detector.
        macs: share of all its multiplications that are to meet no zero, above 0 and at most 1.

    Raises:
        ConfigError: so few cannot remain, as the stem and the head are not pruned.
    """
    imgsz = STRIDES[-1]
    total = total_macs(model.quantizable_convolutions(), imgsz)
    prunable = total_macs(model.prunable_convolutions(), imgsz)
    needed = (1.0 - macs) * total / prunable
    if needed > _MOST_ZEROS:
        least = math.ceil(100 * (1.0 - _MOST_ZEROS * prunable / total)) / 100
        do = "Stem and head are not pruned; take a smaller model for less."
        raise ConfigError(expected("model.macs", f"at least {least:.2f} for yolov5{model.size}", macs, do))
    return needed


def load_teacher(file: Path | None, model: YOLOv5, start: Start, names: Sequence[str] = ()) -> YOLOv5:
    """The detector that a distilling recipe learns from; its size may be another.

    Args:
        file: its checkpoint; None: the start itself, as it is now.
        model: the start, before it is pruned.
        start: where its weights came from.
        names: of the data set's classes; none: the order of the teacher's is not looked at.

    Raises:
        ConfigError: the start is to teach and knows nothing of these classes yet.
        CheckpointError: the checkpoint cannot be read, or tells other classes apart.
    """
    if file is None:
        if start.untrained:
            raise ConfigError(
                f"recipe.teacher=self would teach noise: {start.untrained} random, not trained on these "
                "classes. Use recipe.teacher=baseline with recovery.baseline=auto, or give a checkpoint: "
                "recipe.teacher=PATH."
            )
        return copy.deepcopy(model)
    found, classes = _load_detector(file)
    if not torch.allclose(found.anchors, model.anchors.to(found.anchors), rtol=0.01):
        raise ConfigError(
            f"The teacher {file} has other anchors than the model, so that its predictions mean other sizes. "
            "Give one that was trained with these (recipe.teacher=baseline), or set model.anchors=start."
        )
    if found.num_classes != model.num_classes:
        should_be, do = f"{model.num_classes} as in the data set", "Give one trained on these classes."
        raise CheckpointError(
            expected(f"the classes of the teacher {file}", should_be, found.num_classes, do)
        )
    if mixes_classes(classes, names):
        should_be, do = f"in the data set's order ({shorten(', '.join(names), 80)})", "Give another teacher."
        got = shorten(", ".join(classes), 80)
        raise CheckpointError(expected(f"the classes of the teacher {file}", should_be, got, do))
    return found


def _load_detector(path: Path) -> tuple[YOLOv5, tuple[str, ...]]:
    """A detector and its class names from a published checkpoint, or from one of ours, quantized or not."""
    checkpoint = read_checkpoint(path)
    if checkpoint.format == "sparse_exp" or is_quantized(list(checkpoint.state_dict)):
        return restore(path)[0], checkpoint.names
    model = build_detector(checkpoint.size, checkpoint.num_classes, checkpoint.widths)
    transfer_weights(model, checkpoint)
    return model, checkpoint.names
