"""``dry_run=true``: the plan without touching the network or making a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sparse_exp.config.schema import Experiment
from sparse_exp.data import DetectionDataset, is_prepared, prepare
from sparse_exp.hardware import has_bf16
from sparse_exp.planning.plan import Plan, make_plan, plan_without_training, with_mismatch
from sparse_exp.planning.preflight import plan_training
from sparse_exp.planning.rules import Settled, is_open, settle
from sparse_exp.planning.show import show_plan
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.runs.directory import Run
from sparse_exp.sources.cache import cache_directory
from sparse_exp.sources.local import zoo_directory
from sparse_exp.sources.start import SCRATCH, StartFile, cached_start, chosen, teacher_file
from sparse_exp.training.devices import choose_device
from sparse_exp.training.precision import Precision, choose_precision
from sparse_exp.training.start import Start, slim_start
from sparse_exp.yolov5 import YOLOv5

ReadRecipe = Callable[[Experiment], Recipe]


def show(
    experiment: Experiment,
    recipe: Recipe,
    mismatch: Sequence[str] = (),
    read_recipe: ReadRecipe | None = None,
) -> None:
    """Print the plan; what is in the cache is looked at, nothing is fetched.

    Steps are timed, as before a training, when the data and the start checkpoint are there.

    Args:
        experiment: the checked configuration, fitted to this host.
        recipe: its recipe.
        mismatch: what of its target does not fit the host, a clause each.
        read_recipe: reads the recipe of an experiment whose length the data have chosen; None: ``recipe`` is
            as it runs.

    Raises:
        SparseExpError: what would refuse the run before epoch 0, as far as it can be known offline.
    """
    trains = not {"plan", "train"}.isdisjoint(experiment.stages)
    if not trains:
        plan = plan_without_training(experiment)
    else:
        plan = _plan(experiment, recipe, read_recipe or (lambda _: recipe))
    show_plan(with_mismatch(plan, experiment.hardware.name, mismatch))


def _plan(experiment: Experiment, recipe: Recipe, read_recipe: ReadRecipe) -> Plan:
    cache, zoo = cache_directory(experiment.paths.cache), zoo_directory(experiment.paths.zoo)
    device = choose_device(experiment.trainer.device)
    precision = choose_precision(experiment.trainer, has_bf16=has_bf16(), device=device)
    start = cached_start(experiment.model, cache, zoo)
    # read even where the start is not here: what is wrong with the data can be said now
    dataset = prepare(experiment.dataset, cache) if is_prepared(experiment.dataset, cache) else None
    settled = _settled(experiment, recipe, dataset, precision, device) if dataset else Settled()
    experiment = settled.applied(experiment)
    recipe = read_recipe(experiment) if settled.num_epochs is not None else recipe
    if dataset and (start or experiment.model.weights == SCRATCH):
        teacher = (
            teacher_file(experiment.recipe.teacher, cache, zoo, offline=True) if recipe.distills else None
        )
        plan = plan_training(experiment, recipe, dataset, precision, start, teacher, settled.why)
        asked = tuple(source.uri for source in experiment.model.sources) if start and start.grown else ()
        return replace(plan, asked_first=asked)
    model = YOLOv5(experiment.model.size, len(dataset.names) if dataset else 1)
    recipe.check(model)
    slim_start(model, recipe, experiment.recipe)
    plan = make_plan(experiment, recipe, _unread(experiment, start), precision, model)
    later = {"batch and length": "follow from the training images, once they are on this machine"}
    rules = later if dataset is None and is_open(experiment) else settled.why
    return replace(plan, waits_for_start=not experiment.recipe.oneshot, rules=rules)


def _settled(
    experiment: Experiment,
    recipe: Recipe,
    dataset: DetectionDataset,
    precision: Precision,
    device: torch.device,
) -> Settled:
    """What the rules choose, or have chosen where a run is gone on with."""
    earlier = Run.find(Path(experiment.resume)) if experiment.resume else None
    kept = earlier.state.get("settled") if earlier else None
    return Settled.of(kept) if kept else settle(experiment, recipe, dataset, precision, device)


def _unread(experiment: Experiment, start: StartFile | None) -> Start:
    """The start as far as it is known while it is not read."""
    model = experiment.model
    if model.weights == SCRATCH:
        return Start(SCRATCH, 0.0)
    if start:
        return Start(f"{start.name} (on this machine)", None)
    uris = [chosen(model), *(source.uri for source in (*model.sources, *model.grow_from))]
    return Start(f"{next(filter(None, uris), 'nowhere')} (to be fetched)", None)
