"""The plan of a run whose data and start checkpoint are on this machine, with a few steps tried."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.config.schema import Experiment, SourceConfig
from sparse_exp.data import DetectionDataset
from sparse_exp.data.loader import Batch, make_loader
from sparse_exp.planning.plan import Data, Plan, make_plan, pruning_step, with_trial
from sparse_exp.planning.trial import try_steps
from sparse_exp.sources.local import zoo_directory
from sparse_exp.sources.start import find_here
from sparse_exp.sparsity.recipe import Recipe
from sparse_exp.training.oneshot import refuse_untrained_start
from sparse_exp.training.precision import Precision
from sparse_exp.training.processes import check_devices
from sparse_exp.training.start import Loaded, examine, load_start, load_teacher, prune_start
from sparse_exp.training.threads import training_threads, using_threads
from sparse_exp.yolov5 import YOLOv5


def lay_out(
    experiment: Experiment,
    recipe: Recipe,
    dataset: DetectionDataset,
    precision: Precision,
    cache: Path,
    *,
    offline: bool = False,
) -> tuple[Plan, Loaded]:
    """Lay out a run, refuse what cannot end well, and time a few of its steps.

    Args:
        experiment: the checked configuration.
        recipe: its recipe.
        dataset: its data.
        precision: how the floating-point phases compute.
        cache: directory for downloads; the start checkpoint is there already.
        offline: do not fetch a teacher that is not there.

    Returns:
        The plan, and how the start weights came into the model.

    Raises:
        SparseExpError: what would stop the run later on, as far as it can be known now.
    """
    model, loaded = load_start(experiment, dataset, cache)
    recipe.check(model)
    check_devices(experiment, recipe, model)
    start = examine(model, loaded)
    prune_to = pruning_step(experiment, recipe, start)
    if experiment.recipe.oneshot:
        refuse_untrained_start(loaded)
    teacher = _teacher(experiment, recipe, model, loaded, cache, offline=offline)
    prune_start(model, prune_to, experiment.recipe)
    plan = make_plan(experiment, recipe, start, precision, model)
    if experiment.recipe.oneshot:
        return plan, loaded
    # One process with the threads of all: the same work on the same cores, also the same memory in sum.
    with using_threads(training_threads(experiment) * experiment.trainer.devices):
        trial = try_steps(
            model,
            recipe,
            _batch(experiment, dataset),
            experiment.trainer,
            precision,
            experiment.dataset.imgsz,
            optimizer=experiment.recipe.optimizer,
            teacher=teacher,
        )
    data = Data(*(len(dataset.splits[split]) for split in ("train", "val")))
    return with_trial(plan, trial, recipe, data, experiment.trainer), loaded


def _teacher(
    experiment: Experiment, recipe: Recipe, model: YOLOv5, loaded: Loaded, cache: Path, *, offline: bool
) -> YOLOv5 | None:
    """The teacher, where there is one already: the baseline's training comes after the plan."""
    teacher = experiment.recipe.teacher
    if not recipe.distills or teacher is None or teacher == "baseline":
        return None
    zoo = zoo_directory(experiment.paths.zoo)
    if offline and teacher != "self" and find_here(SourceConfig(uri=teacher), cache, zoo) is None:
        return None
    return load_teacher(teacher, model, loaded, baseline=None, cache=cache, zoo=zoo)


def _batch(experiment: Experiment, dataset: DetectionDataset) -> Batch:
    """A batch of the size and kind that the training sees, made of its first images only."""
    size = experiment.trainer.batch_size
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
