"""``dry_run=true``: the plan without touching the network or making a run."""

from __future__ import annotations

from sparse_exp.config.schema import Experiment
from sparse_exp.hardware import has_bf16
from sparse_exp.plan import Start, make_plan
from sparse_exp.report.console import show_plan
from sparse_exp.sparsity.recipe import Recipe
from sparse_exp.training.precision import choose_precision
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.zoo.sources import cache_directory
from sparse_exp.zoo.start import SCRATCH, cached_start, sources_of


def show(experiment: Experiment, recipe: Recipe) -> None:
    """Print the plan; what is in the cache is looked at, nothing is fetched.

    Raises:
        SparseExpError: what would refuse the run before epoch 0, as far as it can be known offline.
    """
    recipe.check(YOLOv5(experiment.model.size, num_classes=1))
    precision = choose_precision(experiment.trainer, has_bf16=has_bf16())
    show_plan(make_plan(experiment, recipe, _start(experiment), precision))


def _start(experiment: Experiment) -> Start:
    from sparse_exp.data import is_prepared, prepare
    from sparse_exp.training.start import examine, load_start

    cache = cache_directory(experiment.paths.cache)
    if experiment.model.weights == SCRATCH:
        return Start(SCRATCH, 0.0)
    if cached_start(experiment.model, cache) is None:
        return Start(f"{sources_of(experiment.model)[0].uri} (to be fetched)", None)
    if not is_prepared(experiment.dataset, cache):
        return Start(f"{sources_of(experiment.model)[0].uri} (cached)", None)
    return examine(*load_start(experiment, prepare(experiment.dataset, cache), cache))
