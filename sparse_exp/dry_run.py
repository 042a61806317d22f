"""``dry_run=true``: the plan without touching the network or making a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparse_exp.config.schema import Experiment
from sparse_exp.hardware import has_bf16
from sparse_exp.plan import Plan, Start, make_plan
from sparse_exp.report.console import show_plan
from sparse_exp.sparsity.recipe import Recipe
from sparse_exp.training.precision import choose_precision
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.zoo.sources import cache_directory
from sparse_exp.zoo.start import SCRATCH, cached_start, sources_of


def show(experiment: Experiment, recipe: Recipe) -> None:
    """Print the plan; what is in the cache is looked at, nothing is fetched.

    Steps are timed, as before a training, when the data and the start checkpoint are there.

    Raises:
        SparseExpError: what would refuse the run before epoch 0, as far as it can be known offline.
    """
    show_plan(_plan(experiment, recipe))


def _plan(experiment: Experiment, recipe: Recipe) -> Plan:
    from sparse_exp.data import is_prepared, prepare
    from sparse_exp.training.preflight import lay_out

    cache = cache_directory(experiment.paths.cache)
    precision = choose_precision(experiment.trainer, has_bf16=has_bf16())
    if is_prepared(experiment.dataset, cache) and _has_start(experiment, cache):
        dataset = prepare(experiment.dataset, cache)
        return lay_out(experiment, recipe, dataset, precision, cache, offline=True)[0]
    model = YOLOv5(experiment.model.size, num_classes=1)
    recipe.check(model)
    plan = make_plan(experiment, recipe, _unread(experiment, cache), precision, model)
    later = "estimated once the data and the start checkpoint are on this machine"
    return plan if experiment.recipe.oneshot else replace(plan, facts={**plan.facts, "time": later})


def _has_start(experiment: Experiment, cache: Path) -> bool:
    return experiment.model.weights == SCRATCH or cached_start(experiment.model, cache) is not None


def _unread(experiment: Experiment, cache: Path) -> Start:
    """The start as far as it is known while it is not read."""
    if experiment.model.weights == SCRATCH:
        return Start(SCRATCH, 0.0)
    where = "cached" if _has_start(experiment, cache) else "to be fetched"
    return Start(f"{sources_of(experiment.model)[0].uri} ({where})", None)
