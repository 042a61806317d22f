"""The start of a training: the detector with its start weights, pruned where the plan says so."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparse_exp.config.schema import Experiment, RecipeConfig
from sparse_exp.data import DetectionDataset
from sparse_exp.errors import CheckpointError, ConfigError, expected
from sparse_exp.sources.local import zoo_directory
from sparse_exp.sources.start import SCRATCH, cached_start, fetch_start, locate
from sparse_exp.sparsity.checkpoints import restore
from sparse_exp.sparsity.measure import SPARSE_FROM, layer_sparsity, listed, overall, state_sparsity
from sparse_exp.sparsity.prune import BLOCK, prune_by_magnitude, prune_layer_adaptively
from sparse_exp.sparsity.recipe import is_quantized
from sparse_exp.yolov5 import Checkpoint, TransferReport, YOLOv5, read_checkpoint, transfer_weights

if TYPE_CHECKING:
    from sparse_exp.yolov5 import YOLOv5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """How start weights came into a model.

    Attributes:
        origin: where the checkpoint came from, ``grown:...``, or ``scratch``.
        checkpoint: what it held, as far as it was grown after that; None for ``scratch``.
        report: which tensors were taken; None for ``scratch``.
        grown_from: where the smaller checkpoint came from that it was grown from; "" where it was not.
    """

    origin: str
    checkpoint: Checkpoint | None = None
    report: TransferReport | None = None
    grown_from: str = ""

    @property
    def left(self) -> tuple[str, ...]:
        """Names of the tensors that kept their initial values."""
        return self.report.left if self.report else ()

    @property
    def untrained(self) -> str:
        """What is random in these weights, as the beginning of a sentence; empty where nothing is."""
        if self.left:
            return f"{listed(self.left)} of the start ({self.origin}) are"
        return "" if self.checkpoint else "the start is"


def load_start(experiment: Experiment, dataset: DetectionDataset, cache: Path) -> tuple[YOLOv5, Loaded]:
    """Build the detector for the data set's classes and give it the start weights.

    What the fetch stage brought is taken from this machine; other sources are not asked again. The initial
    weights of what is not taken, and the noise of a start that is grown, are functions of the seed.

    Raises:
        SourceUnavailable: the start cannot be had.
        CheckpointError: it cannot be read, or is of another architecture.
    """
    torch.manual_seed(experiment.seed)
    model = YOLOv5(experiment.model.size, len(dataset.names))
    places = experiment.model, cache, zoo_directory(experiment.paths.zoo)
    start = cached_start(*places) or fetch_start(*places)
    if start is None:
        return model, Loaded(SCRATCH)
    checkpoint = read_checkpoint(start.file.path)
    if start.grown:
        checkpoint = _grown(checkpoint, experiment)
    grown_from = start.file.origin if start.grown else ""
    report = None if is_quantized(list(checkpoint.state_dict)) else transfer_weights(model, checkpoint)
    return model, Loaded(start.name, checkpoint, report, grown_from)


def _grown(checkpoint: Checkpoint, experiment: Experiment) -> Checkpoint:
    from sparse_exp.yolov5.grow import grow

    return grow(checkpoint, experiment.model.size, seed=experiment.seed)


def examine(model: YOLOv5, loaded: Loaded) -> Start:
    """What the plan needs to know of a loaded start."""
    state = loaded.checkpoint.state_dict if loaded.checkpoint else {}
    quantized = is_quantized(list(state))
    layers = layer_sparsity(model.prunable_convolutions())
    if quantized:  # then its weights are not in the model, whose structure is another
        prunable = model.prunable_convolutions()
        layers = [layer for layer in state_sparsity(state) if layer.name in prunable]
    if loaded.report:
        _log.info(
            "%d of %d tensors taken from %s%s.",
            loaded.report.taken,
            loaded.report.total,
            loaded.origin,
            f"; {len(loaded.left)} in part (of the head not the classes)" if loaded.left else "",
        )
    return Start(loaded.origin, overall(layers), quantized, loaded.left, loaded.grown_from)


def prune_start(model: YOLOv5, sparsity: float | None, config: RecipeConfig) -> None:
    """The pruning step that the plan inserted, if it did.

    Args:
        model: pruned in place.
        sparsity: share of zeros in its prunable convolutions, 0..1; None for no such step.
        config: its ``pattern`` and ``shares``.
    """
    if sparsity is not None:
        prune = prune_by_magnitude if config.shares == "uniform" else prune_layer_adaptively
        prune(model.prunable_convolutions(), sparsity, block=BLOCK if config.pattern == "block4" else 1)
        _log.info(
            "Pruned the dense start to %.2f %% zeros (%s, %s shares).",
            100 * overall(layer_sparsity(model.prunable_convolutions())),
            config.pattern,
            config.shares,
        )


def load_teacher(
    teacher: str, model: YOLOv5, loaded: Loaded, *, baseline: Path | None, cache: Path, zoo: Path
) -> YOLOv5:
    """The detector that a distilling recipe learns from; its size may be another.

    Args:
        teacher: ``self`` (the start, as it is now), ``baseline``, or where a checkpoint can be had, as
            `sparse_exp.sources.start.locate` takes it.
        model: the start, before it is pruned.
        loaded: where its weights came from.
        baseline: the dense counterpart's checkpoint, where one was trained or found.
        cache: directory for downloads.
        zoo: the local zoo.

    Raises:
        ConfigError: there is no baseline, or ``self`` knows nothing of these classes yet.
        SourceUnavailable: the checkpoint cannot be had.
        CheckpointError: it cannot be read, or tells other classes apart.
    """
    if teacher == "self":
        _require_taken(loaded)
        return copy.deepcopy(model)
    if teacher == "baseline" and baseline is None:
        do = "Set recovery.baseline=auto, which trains it, or give a checkpoint: recipe.teacher=PATH."
        raise ConfigError(f"recipe.teacher=baseline needs the dense counterpart of this run. {do}")
    path = baseline if teacher == "baseline" and baseline else locate(teacher, cache, zoo).path
    found = _load_detector(path)
    if found.num_classes != model.num_classes:
        should_be, do = f"{model.num_classes} as in the data set", "Give one trained on these classes."
        raise CheckpointError(
            expected(f"the classes of the teacher {path}", should_be, found.num_classes, do)
        )
    return found


def _require_taken(loaded: Loaded) -> None:
    if loaded.untrained:
        raise ConfigError(
            f"recipe.teacher=self would teach noise: {loaded.untrained} random, not trained on these "
            "classes. Use recipe.teacher=baseline with recovery.baseline=auto, or give a checkpoint: "
            "recipe.teacher=PATH."
        )


def _load_detector(path: Path) -> YOLOv5:
    """A detector from a published checkpoint, or from one of ours, quantized or not."""
    checkpoint = read_checkpoint(path)
    if checkpoint.format == "sparse_exp" or is_quantized(list(checkpoint.state_dict)):
        return restore(path)[0]
    model = YOLOv5(checkpoint.size, checkpoint.num_classes)
    transfer_weights(model, checkpoint)
    return model


@dataclass(frozen=True)
class Start:
    """What is known of the start checkpoint.

    Attributes:
        origin: where it comes from.
        sparsity: share of zeros in its prunable convolutions; None when it is not on this machine yet.
        quantized: whether it went through QAT.
        left: names of the tensors that it does not fill.
        grown_from: origin of the smaller checkpoint that it is grown from; "" where it is not.
    """

    origin: str
    sparsity: float | None
    quantized: bool = False
    left: tuple[str, ...] = ()
    grown_from: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether it is known to be pruned."""
        return self.sparsity is not None and self.sparsity >= SPARSE_FROM
