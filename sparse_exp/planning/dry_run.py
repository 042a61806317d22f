"""``dry_run=true``: the plan without touching the network or making a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparse_exp.config.schema import Experiment
from sparse_exp.data import is_prepared, prepare
from sparse_exp.hardware import has_bf16
from sparse_exp.planning.plan import Plan, make_plan, plan_without_training, with_mismatch
from sparse_exp.planning.preflight import plan_training
from sparse_exp.planning.show import show_plan
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sources.cache import cache_directory
from sparse_exp.sources.local import zoo_directory
from sparse_exp.sources.start import SCRATCH, StartFile, cached_start, chosen, teacher_file
from sparse_exp.training.precision import choose_precision
from sparse_exp.training.start import Start
from sparse_exp.yolov5 import YOLOv5


def show(experiment: Experiment, recipe: Recipe, mismatch: Sequence[str] = ()) -> None:
    """Print the plan; what is in the cache is looked at, nothing is fetched.

    Steps are timed, as before a training, when the data and the start checkpoint are there.

    Args:
        experiment: the checked configuration, fitted to this host.
        recipe: its recipe.
        mismatch: what of its target does not fit the host, a clause each.

    Raises:
        SparseExpError: what would refuse the run before epoch 0, as far as it can be known offline.
    """
    trains = not {"plan", "train"}.isdisjoint(experiment.stages)
    plan = _plan(experiment, recipe) if trains else plan_without_training(experiment)
    show_plan(with_mismatch(plan, experiment.hardware.name, mismatch))


def _plan(experiment: Experiment, recipe: Recipe) -> Plan:
    cache, zoo = cache_directory(experiment.paths.cache), zoo_directory(experiment.paths.zoo)
    precision = choose_precision(experiment.trainer, has_bf16=has_bf16())
    start = cached_start(experiment.model, cache, zoo)
    # read even where the start is not here: what is wrong with the data can be said now
    dataset = prepare(experiment.dataset, cache) if is_prepared(experiment.dataset, cache) else None
    if dataset and (start or experiment.model.weights == SCRATCH):
        teacher = (
            teacher_file(experiment.recipe.teacher, cache, zoo, offline=True) if recipe.distills else None
        )
        plan = plan_training(experiment, recipe, dataset, precision, start, teacher)
        asked = tuple(source.uri for source in experiment.model.sources) if start and start.grown else ()
        return replace(plan, asked_first=asked)
    model = YOLOv5(experiment.model.size, len(dataset.names) if dataset else 1)
    recipe.check(model)
    plan = make_plan(experiment, recipe, _unread(experiment, start), precision, model)
    return replace(plan, waits_for_start=not experiment.recipe.oneshot)


def _unread(experiment: Experiment, start: StartFile | None) -> Start:
    """The start as far as it is known while it is not read."""
    model = experiment.model
    if model.weights == SCRATCH:
        return Start(SCRATCH, 0.0)
    if start:
        return Start(f"{start.name} (on this machine)", None)
    uris = [chosen(model), *(source.uri for source in (*model.sources, *model.grow_from))]
    return Start(f"{next(filter(None, uris), 'nowhere')} (to be fetched)", None)
