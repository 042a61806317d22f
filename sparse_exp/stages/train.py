"""The training of a run: everything that it needs, brought together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_exp.data.loader import DetectionLoader
from sparse_exp.files import write_json, write_text
from sparse_exp.sparsity.measure import (
    SPARSE_FROM,
    layer_sparsity,
    overall,
    require_layer_sparsity,
    require_sparsity,
)
from sparse_exp.stages.base import Context, Outcome
from sparse_exp.stages.sparsity_csv import announce_sparsity, write_sparsity
from sparse_exp.tracking import Artifact, Metrics
from sparse_exp.training.loop import Record, TrainingData, TrainingResult
from sparse_exp.training.oneshot import apply_at_once, calibration_loader, refuse_untrained_start
from sparse_exp.training.processes import fit_together
from sparse_exp.training.start import Loaded, load_start, load_teacher, prune_start
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
    file = StateFile(context.run.path / STATE, context.mark, context.tracker.run_id)
    state = None if context.experiment.recipe.oneshot else file.read()
    if state and state["tracker_run"] != context.tracker.run_id:  # a new one, which knows no epoch yet
        for record in state["history"]:
            context.tracker.log(epoch_metrics(record))
    try:
        return _run(context, on_epoch, file, state)
    except StateError as error:
        _log.warning("%s", not_used(file.path, str(error)))
        return _run(context, on_epoch, file, None)


def epoch_metrics(record: Record) -> Metrics:
    """What the tracker is told of a record of the history; a step is a hundredth of an epoch."""
    numbers = {name: value for name, value in record.items() if isinstance(value, float)}
    return Metrics(numbers, step=round(100 * record["epoch"]))


def _run(
    context: Context, on_epoch: Callable[[Record], None], file: StateFile, state: State | None
) -> tuple[TrainingResult, str]:
    model, loaded = load_start(context.experiment, context.dataset, context.cache)
    composed = context.recipe.after(loaded.checkpoint.recipe if loaded.checkpoint else "")
    if context.experiment.recipe.oneshot:
        refuse_untrained_start(loaded)
    teacher = _teacher(context, model, loaded)
    _prepare(context, model)
    loaders = _train_loader(context), context.loader("val")
    data = TrainingData(*loaders, context.dataset.names, context.experiment.dataset.imgsz)
    if context.experiment.recipe.oneshot:
        return _at_once(context, model, data, composed, on_epoch), composed
    return _fit(context, model, data, teacher, composed, on_epoch, file, state), composed


def _teacher(context: Context, model: YOLOv5, loaded: Loaded) -> YOLOv5 | None:
    teacher = context.experiment.recipe.teacher
    if teacher is None or not context.recipe.distills:
        return None
    checkpoint = context.facts("baseline").get("checkpoint")
    baseline = context.run.path / checkpoint if checkpoint else None
    return load_teacher(teacher, model, loaded, baseline=baseline, cache=context.cache, zoo=context.zoo)


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


def _at_once(
    context: Context, model: YOLOv5, data: TrainingData, composed: str, on_epoch: Callable[[Record], None]
) -> TrainingResult:
    weights, trainer = context.run.path / "weights", context.experiment.trainer
    result = apply_at_once(
        model, context.recipe, data, trainer, context.precision, weights=weights, composed=composed
    )
    on_epoch(result.history[0])
    return result


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


def train(context: Context) -> Outcome:
    """Fine-tune under the recipe, or apply it at once; the best checkpoint of the last phase goes on."""
    from sparse_exp.stages.train import run_training
    from sparse_exp.training.state import STATE

    weights = context.run.path / "weights"
    weights.mkdir(exist_ok=True)
    result, composed = run_training(context, lambda record: _log_epoch(context, record))
    history = write_json(context.run.path / "history.json", result.history)
    phase, best = list(result.phases.items())[-1]
    table = write_sparsity(context, best.path, best.promised)
    facts = {
        "checkpoint": str(best.path.relative_to(context.run.path)),
        "phase": phase,
        "epoch": best.epoch,
        "promised": best.promised,
        "recipe": composed,
        "devices": context.experiment.trainer.devices,
        "threads": context.threads,
    }
    state = context.run.path / STATE
    checkpoints = sorted(path for path in weights.glob("[!.]*.pt") if path != state)
    return Outcome([history, table, *checkpoints], facts=facts, spent=[state])


def _announce_train(context: Context) -> None:
    context.tracker.log(Artifact(write_recipe(context)))
    announce_sparsity(context, "train")


def _log_epoch(context: Context, record: dict[str, Any]) -> None:
    from sparse_exp.stages.train import epoch_metrics

    context.tracker.log(epoch_metrics(record))
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


def write_recipe(context: Context) -> Path:
    """Keep the recipe as it runs beside the run's other files, after the training with that of its start."""
    text = str(context.facts("train").get("recipe", "")) or context.recipe.text
    return write_text(context.run.path / "recipe.md", f"---\n{text.strip()}\n---\n")
