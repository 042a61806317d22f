"""The plan of a run whose data and start checkpoint are on this machine, with a few steps tried."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from sparse_exp.config.schema import Experiment
from sparse_exp.data import DetectionDataset
from sparse_exp.data.loader import Batch, make_loader
from sparse_exp.data.store import memory_of
from sparse_exp.hardware.cgroups import free_memory
from sparse_exp.planning.plan import Data, Plan, make_plan, pruning_step, with_anchors, with_trial
from sparse_exp.planning.speed import speed_shares
from sparse_exp.planning.trial import try_steps
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sources.start import StartFile
from sparse_exp.training.devices import choose_device, processes_on
from sparse_exp.training.oneshot import refuse_untrained_start
from sparse_exp.training.precision import Precision
from sparse_exp.training.processes import check_devices
from sparse_exp.training.start import load_start, load_teacher, prune_start, slim_start, suit_anchors
from sparse_exp.training.threads import training_threads, using_threads

_log = logging.getLogger(__name__)


def plan_training(
    experiment: Experiment,
    recipe: Recipe,
    dataset: DetectionDataset,
    precision: Precision,
    file: StartFile | None,
    teacher: Path | None,
    rules: Mapping[str, str] | None = None,
) -> Plan:
    """Plan a training, refuse what cannot end well, and time a few of its steps.

    Args:
        experiment: the checked configuration.
        recipe: its recipe.
        dataset: its data.
        precision: how the floating-point phases compute.
        file: the start checkpoint; None: random weights.
        teacher: file of the checkpoint that ``recipe.teacher`` names; None where it names none, or one that
            is not on this machine.
        rules: see `Plan`.

    Raises:
        SparseExpError: what would stop the run later on, as far as it can be known now.
    """
    model, start = load_start(file, experiment.model.size, dataset.names, seed=experiment.seed)
    if start.report:
        partly = f"; {len(start.left)} in part (of the head not the classes)" if start.left else ""
        _log.info("%s taken from %s%s.", start.transferred, start.origin, partly)
    anchors = suit_anchors(model, dataset, experiment)
    recipe.check(model)
    check_devices(experiment, recipe)
    prune_to = pruning_step(experiment, recipe, start)
    if experiment.recipe.oneshot:
        refuse_untrained_start(start, dataset.names)
    distills = recipe.distills and (teacher is not None or experiment.recipe.teacher == "self")
    learns_from = load_teacher(teacher, model, start, dataset.names) if distills else None
    slim_start(model, recipe, experiment.recipe)
    threads = training_threads(experiment) * experiment.trainer.devices
    speed = None
    if prune_to is not None and experiment.recipe.shares == "speed":
        with using_threads(threads):
            speed = speed_shares(model, experiment, recipe, dataset)
    shares = speed.shares if speed else None
    prune_start(model, prune_to, experiment.recipe, experiment.model.macs, shares)
    plan = with_anchors(make_plan(experiment, recipe, start, precision, model, speed), anchors)
    if not experiment.recipe.oneshot:
        rules = {**(rules or {}), "warm-up": _warmup(experiment, recipe, dataset)}
    plan = replace(plan, rules=rules or {}, warnings=(*plan.warnings, *_copies(experiment, dataset)))
    if experiment.recipe.oneshot:
        return plan
    # On CPUs one process with the threads of all: the same work on the same cores, also the same memory in
    # sum. On GPUs one process with its share of a batch.
    with using_threads(threads):
        trial = try_steps(
            model,
            recipe,
            training_batch(experiment, dataset),
            experiment.trainer,
            precision,
            experiment.dataset.imgsz,
            optimizer=experiment.recipe.optimizer,
            teacher=learns_from,
        )
    data = Data(*(len(dataset.splits[split]) for split in ("train", "val")))
    return with_trial(plan, trial, recipe, data)


def _warmup(experiment: Experiment, recipe: Recipe, dataset: DetectionDataset) -> str:
    """How long the learning rate rises, in epochs and in steps."""
    steps = math.ceil(len(dataset.splits["train"]) / experiment.trainer.batch_size)
    epochs, who = experiment.trainer.warmup, "trainer.warmup"
    if recipe.sets_learning_rate:
        epochs, who = recipe.warmup, "a share of the recipe's epochs, or as it says"
    return f"{epochs:g} epochs, {round(epochs * steps)} steps of {recipe.epochs * steps:.0f} ({who})"


def _copies(experiment: Experiment, dataset: DetectionDataset) -> Iterator[str]:
    """Say where each of several processes keeps all images in memory."""
    devices, images = experiment.trainer.devices, len(dataset.splits["train"])
    if experiment.dataset.cache == "ram" and devices > 1 and not experiment.recipe.oneshot:
        need, free = devices * memory_of(images, experiment.dataset.imgsz), free_memory()
        yield (
            f"dataset.cache=ram keeps the training images in each of {devices} processes, {need / 1e9:.1f} "
            f"GB in all; {free / 1e9:.1f} GB are free. With dataset.cache=disk they share them."
        )


def training_batch(experiment: Experiment, dataset: DetectionDataset) -> Batch:
    """A batch of the size and kind that a process of the training sees, made of its first images only.

    Args:
        experiment: the configuration; its size of a batch is a number.
        dataset: its data.
    """
    trainer = experiment.trainer
    size = trainer.batch_size // processes_on(choose_device(trainer.device), trainer.devices)
    loader = make_loader(
        dataset.splits["train"][:size],
        len(dataset.names),
        imgsz=experiment.dataset.imgsz,
        batch_size=size,
        train=True,
        seed=experiment.seed,
        augment=experiment.trainer.augment,
    )
    batch: Batch = next(iter(loader))
    return batch
