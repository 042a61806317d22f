"""The training of a run: what it needs is brought together, and what was cut off goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sparse_exp.data.loader import DetectionLoader
from sparse_exp.errors import ConfigError
from sparse_exp.sources.start import teacher_file
from sparse_exp.sparsity.measure import (
    SPARSE_FROM,
    layer_sparsity,
    overall,
    require_layer_sparsity,
    require_sparsity,
)
from sparse_exp.stages.base import Context
from sparse_exp.tracking import epoch_metrics
from sparse_exp.training.loop import Record, TrainingData, TrainingResult
from sparse_exp.training.oneshot import apply_at_once, calibration_loader, refuse_untrained_start
from sparse_exp.training.processes import fit_together
from sparse_exp.training.start import Start, load_start, load_teacher, prune_start
from sparse_exp.training.state import STATE, State, StateError, StateFile, not_used
from sparse_exp.yolov5 import YOLOv5

_log = logging.getLogger(__name__)


def run_training(context: Context, on_epoch: Callable[[Record], None]) -> tuple[TrainingResult, str]:
    """Train under the run's recipe, or apply it at once; checkpoints go to ``weights/``.

    A training that was cut off goes on after the last epoch whose state was saved.

    Args:
        context: of the run; its plan is held to where there is one.
        on_epoch: called with each record of the history.

    Returns:
        What the training left, and the recipe that its checkpoints carry: that of the start checkpoint
        and the run's own.

    Raises:
        SparseExpError: the start is not what was planned, a promise about zeros was broken, or the
            teacher cannot be had.
    """
    path, run_id = context.run.path / STATE, context.tracker.run_id
    file = StateFile(path, context.mark, run_id, earlier_mark=context.earlier_mark)
    state = None if context.experiment.recipe.oneshot else file.read()
    if state and state["tracker_run"] != context.tracker.run_id:  # a new one, which knows no epoch yet
        for record in state["history"]:
            context.tracker.log(epoch_metrics(record))
    try:
        return _run(context, on_epoch, file, state)
    except StateError as error:
        _log.warning("%s", not_used(file.path, str(error)))
        return _run(context, on_epoch, file, None)


def _run(
    context: Context, on_epoch: Callable[[Record], None], file: StateFile, state: State | None
) -> tuple[TrainingResult, str]:
    experiment, names = context.experiment, context.dataset.names
    model, start = load_start(context.start, experiment.model.size, len(names), seed=experiment.seed)
    composed = context.recipe.after(start.checkpoint.recipe if start.checkpoint else "")
    if experiment.recipe.oneshot:
        refuse_untrained_start(start)
    teacher = _teacher(context, model, start)
    _prepare(context, model)
    data = TrainingData(_train_loader(context), context.validation(), names, experiment.dataset.imgsz)
    if experiment.recipe.oneshot:
        weights = context.run.path / "weights"
        result = apply_at_once(
            model, context.recipe, data, context.precision, weights=weights, composed=composed
        )
        on_epoch(result.history[0])
        return result, composed
    return _fit(context, model, data, teacher, composed, on_epoch, file, state), composed


def _teacher(context: Context, model: YOLOv5, start: Start) -> YOLOv5 | None:
    teacher = context.experiment.recipe.teacher
    if teacher is None or not context.recipe.distills:
        return None
    baseline = context.run.baseline_checkpoint
    if teacher == "baseline" and baseline is None:
        do = "Set recovery.baseline=auto, which trains it, or give a checkpoint: recipe.teacher=PATH."
        raise ConfigError(f"recipe.teacher=baseline needs the dense counterpart of this run. {do}")
    return load_teacher(teacher_file(teacher, context.cache, context.zoo, baseline=baseline), model, start)


def _prepare(context: Context, model: YOLOv5) -> None:
    """Prune a dense start where the plan says so, and hold the start to the plan."""
    planned = context.facts("plan")
    prune_start(model, planned.get("prune_to"), context.experiment.recipe)
    layers = layer_sparsity(model.prunable_convolutions())
    require_sparsity(layers, context.planned_sparsity, "of the start weights")
    require_layer_sparsity(layers, planned.get("layers", {}), "in the start weights")
    if overall(layers) >= SPARSE_FROM and not context.recipe.prunes:
        _log.warning(
            "The start has %.0f %% zeros, and %s does not hold them: they will not stay.",
            100 * overall(layers),
            context.recipe.name,
        )


def _train_loader(context: Context) -> DetectionLoader:
    """Augmented batches; for a recipe applied at once the images to calibrate with."""
    experiment = context.experiment
    if not experiment.recipe.oneshot:
        return context.loader("train", train=True)
    return calibration_loader(
        context.dataset,
        experiment.recipe.calibration_images,
        imgsz=experiment.dataset.imgsz,
        batch_size=experiment.trainer.val_batch_size,
        seed=experiment.seed,
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
        "qat_split": context.facts("plan").get("qat_split", 1),
        "composed": composed,
        "state": file,
    }
    each = f" in each of {devices} processes" if devices > 1 else ""
    _log.info("Training with %s, threads: %d%s.", context.precision, threads, each)
    return fit_together(arguments, state, devices=devices, threads=threads, on_epoch=on_epoch)
