"""The training of a run: what it needs is brought together, and what was cut off goes on."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable

from sparse_exp.errors import ConfigError
from sparse_exp.files import write_json
from sparse_exp.runs.replay import HISTORY
from sparse_exp.sources.start import PARENT, teacher_file
from sparse_exp.sparsity.measure import (
    SPARSE_FROM,
    layer_sparsity,
    overall,
    require_layer_sparsity,
    require_sparsity,
)
from sparse_exp.stages.base import Context
from sparse_exp.tracking import ENDED, epoch_metrics
from sparse_exp.training.loop import Record, TrainingData, TrainingResult
from sparse_exp.training.oneshot import apply_at_once, calibration_loader, refuse_untrained_start
from sparse_exp.training.processes import fit_together
from sparse_exp.training.start import Start, load_start, load_teacher, prune_start, slim_start, suit_anchors
from sparse_exp.training.state import STATE, State, StateError, StateFile, not_used
from sparse_exp.yolov5 import YOLOv5

_log = logging.getLogger(__name__)


def run_training(context: Context) -> tuple[TrainingResult, str]:
    """Train under the run's recipe, or apply it at once; checkpoints go to ``weights/``.

    A training that was cut off goes on after the last epoch whose state was saved.

    Args:
        context: of the run; its plan is held to where there is one. Each record of the history is kept in
            ``history.json`` before the tracker is told.

    Returns:
        What the training left, and the recipe that its checkpoints carry: that of the start checkpoint
        and the run's own.

    Raises:
        SparseExpError: the start is not what was planned, a promise about zeros was broken, or the
            teacher cannot be had.
    """
    file = StateFile(context.run.path / STATE, context.mark, context.earlier_mark)
    state = None if context.experiment.recipe.oneshot else file.read()
    try:
        return _run(context, file, state)
    except StateError as error:
        _log.warning("%s", not_used(file.path, str(error)))
        return _run(context, file, None)


class _History:
    """The records of a training so far, in ``history.json``; the tracker is told of each."""

    def __init__(self, context: Context, state: State | None) -> None:
        self._context, self._path = context, context.run.path / HISTORY
        self._records: list[Record] = list(state["history"]) if state else []
        write_json(self._path, self._records)

    def add(self, record: Record) -> None:
        """Keep a record, with the time at which its epoch ended."""
        record[ENDED] = time.time()
        self._records.append(record)
        write_json(self._path, self._records)
        self._context.tracker.log(epoch_metrics(record), record[ENDED])
        losses = "".join(
            f"{name.removeprefix('loss/')} {value:.4f} "
            for name, value in record.items()
            if name.startswith("loss/")
        )
        speed = f"  {record['images_per_s']:.1f} images/s" if "images_per_s" in record else ""
        _log.info(
            "epoch %-5.4g %-12s %s mAP50 %.3f  sparsity %.4f%s",
            *(record[name] for name in ("epoch", "phase")),
            losses,
            *(record[name] for name in ("val/map50", "sparsity/prunable")),
            speed,
        )


def _run(context: Context, file: StateFile, state: State | None) -> tuple[TrainingResult, str]:
    history = _History(context, state)
    experiment, names = context.experiment, context.dataset.names
    model, start = load_start(context.start, experiment.model.size, names, seed=experiment.seed)
    suit_anchors(model, context.dataset, experiment)
    composed = context.recipe.after(start.checkpoint.recipe if start.checkpoint else "")
    if experiment.recipe.oneshot:
        refuse_untrained_start(start, names)
    teacher = _teacher(context, model, start)
    _prepare(context, model)
    data = _data(context)
    if experiment.recipe.oneshot:
        weights = context.run.path / "weights"
        result = apply_at_once(
            model,
            context.recipe,
            data,
            context.precision,
            device=context.device,
            weights=weights,
            composed=composed,
        )
        history.add(result.history[0])
        return result, composed
    return _fit(context, model, data, teacher, composed, history.add, file, state), composed


def _teacher(context: Context, model: YOLOv5, start: Start) -> YOLOv5 | None:
    teacher = context.experiment.recipe.teacher
    if teacher is None or not context.recipe.distills:
        return None
    if teacher == PARENT:
        return copy.deepcopy(model)  # it gets its weights when the first channels go
    baseline = context.run.baseline_checkpoint
    if teacher == "baseline" and baseline is None:
        do = "Set recovery.baseline=auto, which trains it, or give a checkpoint: recipe.teacher=PATH."
        raise ConfigError(f"recipe.teacher=baseline needs the dense counterpart of this run. {do}")
    file = teacher_file(teacher, context.cache, context.zoo, baseline=baseline)
    return load_teacher(file, model, start, context.dataset.names)


def _prepare(context: Context, model: YOLOv5) -> None:
    """Prune a dense start where the plan says so, and hold the start to the plan."""
    planned, experiment = context.facts("plan"), context.experiment
    slim_start(model, context.recipe, experiment.recipe)
    prune_start(
        model, planned.get("prune_to"), experiment.recipe, experiment.model.macs, planned.get("shares")
    )
    layers = layer_sparsity(model.prunable_convolutions())
    require_sparsity(layers, context.planned_sparsity, "of the start weights")
    require_layer_sparsity(layers, planned.get("layers", {}), "in the start weights")
    if overall(layers) >= SPARSE_FROM and not context.recipe.prunes:
        _log.warning(
            "The start has %.0f %% zeros, and %s does not hold them: they will not stay.",
            100 * overall(layers),
            context.recipe.name,
        )


def _data(context: Context) -> TrainingData:
    """What the training reads; a recipe applied at once trains on nothing but the calibration images."""
    experiment = context.experiment
    oneshot, quantizes = experiment.recipe.oneshot, context.recipe.quantization_start is not None
    images = calibration_loader(
        context.dataset,
        experiment.recipe.calibration_images,
        imgsz=experiment.dataset.imgsz,
        batch_size=experiment.trainer.val_batch_size,
        seed=experiment.seed,
    )
    return TrainingData(
        images if oneshot else context.loader("train", train=True),
        context.validation(),
        context.dataset.names,
        experiment.dataset.imgsz,
        images if (quantizes or context.recipe.slimming) and not oneshot else None,
    )


def _fit(
    context: Context,
    model: YOLOv5,
    data: TrainingData,
    teacher: YOLOv5 | None,
    composed: str,
    on_epoch: Callable[[Record], None],
    file: StateFile,
    state: State | None,
) -> TrainingResult:
    experiment, devices, threads = context.experiment, context.experiment.trainer.devices, context.threads
    arguments = {
        "model": model,
        "recipe": context.recipe,
        "data": data,
        "config": experiment.trainer,
        "precision": context.precision,
        "weights": context.run.path / "weights",
        "seed": experiment.seed,
        "optimizer": experiment.recipe.optimizer,
        "teacher": teacher,
        "parent_teaches": experiment.recipe.teacher == PARENT,
        "qat_split": context.facts("plan").get("qat_split", 1),
        "composed": composed,
        "state": file,
    }
    each = f" in each of {devices} processes" if devices > 1 else ""
    _log.info("Training with %s, threads: %d%s.", context.precision, threads, each)
    return fit_together(arguments, state, devices=devices, threads=threads, on_epoch=on_epoch)
