"""The start of a training: the detector with its start weights, pruned where the plan says so."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_exp.config.schema import Experiment
from sparse_exp.data import DetectionDataset
from sparse_exp.plan import Start
from sparse_exp.sparsity.measure import layer_sparsity, overall
from sparse_exp.sparsity.prune import prune_layer_adaptively
from sparse_exp.sparsity.recipe import is_quantized
from sparse_exp.yolov5 import Checkpoint, TransferReport, YOLOv5, read_checkpoint, transfer_weights
from sparse_exp.zoo.start import SCRATCH, fetch_start

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """How start weights came into a model.

    Attributes:
        origin: where the checkpoint came from, or ``scratch``.
        checkpoint: what it held; None for ``scratch``.
        report: which tensors were taken; None for ``scratch``.
    """

    origin: str
    checkpoint: Checkpoint | None = None
    report: TransferReport | None = None

    @property
    def left(self) -> tuple[str, ...]:
        """Names of the tensors that kept their initial values."""
        return self.report.left if self.report else ()


def load_start(experiment: Experiment, dataset: DetectionDataset, cache: Path) -> tuple[YOLOv5, Loaded]:
    """Build the detector for the data set's classes and give it the start weights.

    The initial weights of what is not taken are a function of the seed.
    """
    torch.manual_seed(experiment.seed)
    model = YOLOv5(experiment.model.size, len(dataset.names))
    file = fetch_start(experiment.model, cache)
    if file is None:
        return model, Loaded(SCRATCH)
    checkpoint = read_checkpoint(file.path)
    if is_quantized(list(checkpoint.state_dict)):
        return model, Loaded(file.origin, checkpoint)
    loaded = Loaded(file.origin, checkpoint, transfer_weights(model, checkpoint))
    return model, loaded


def examine(model: YOLOv5, loaded: Loaded) -> Start:
    """What the plan needs to know of a loaded start."""
    quantized = loaded.checkpoint is not None and is_quantized(list(loaded.checkpoint.state_dict))
    if loaded.report:
        _log.info(
            "%d of %d tensors taken from %s%s.",
            loaded.report.taken,
            loaded.report.total,
            loaded.origin,
            f"; {len(loaded.left)} left (the head: the number of classes differs)" if loaded.left else "",
        )
    return Start(loaded.origin, overall(layer_sparsity(model.prunable_convolutions())), quantized)


def prune_start(model: YOLOv5, sparsity: float | None) -> None:
    """The pruning step that the plan inserted, if it did."""
    if sparsity is not None:
        prune_layer_adaptively(model.prunable_convolutions(), sparsity)
        _log.info(
            "Pruned the dense start to %.2f %% zeros.",
            100 * overall(layer_sparsity(model.prunable_convolutions())),
        )
