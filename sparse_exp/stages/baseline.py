"""The dense counterpart of a run: found, or trained.

The counterpart has the same model, start weights, data, seed and trainer settings, and sees as many images;
its recipe is the shipped ``dense``. It is looked for before it is trained: in MLflow, then in the run
directories of this machine, by a fingerprint of everything its result depends on. While a run of that
fingerprint trains, whether for its own sake or as a counterpart, others that need it wait for it.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_exp import __version__
from sparse_exp.config.plain import as_dict, recipe_path
from sparse_exp.config.schema import Experiment, RecipeConfig, RecoveryConfig
from sparse_exp.errors import ConfigError, StageFailed, expected
from sparse_exp.files import expanded, fingerprint, sha256_of
from sparse_exp.locks import exclusive
from sparse_exp.runs.directory import MANIFEST, Run, claim
from sparse_exp.stages.base import Context, Outcome, Stage
from sparse_exp.tracking import Event, Tags, find_runs

if TYPE_CHECKING:
    from sparse_exp.recipes.recipe import Recipe

TAG = "fingerprint.dense"
MAP50 = "val/map50"
NEEDED = ("fetch", "plan", "baseline", "train", "evaluate")  # stages that a counterpart runs
_REPLACED = (
    "recipe", "recovery", "stages", "name=", "paths.run", "resume", "overwrite", "publish=",
    "tracker.register", "tracker.alias",
)  # fmt: skip
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baseline:
    """The dense counterpart of a run.

    Attributes:
        map50: COCO mAP50 of its torch model on the validation split, 0..1.
        directory: of its run, absolute; empty for the start checkpoint itself.
        checkpoint: path, absolute; None where the files are gone.
        origin: how it was had: ``found in MLflow``, ``found on disk``, ``trained``, ``given``,
            or ``the start``.
    """

    map50: float
    directory: str
    checkpoint: str | None
    origin: str


def is_dense(recipe: Recipe) -> bool:
    """Whether a recipe removes, rounds and distills nothing: a run of it is a baseline itself."""
    changes = recipe.prunes or recipe.slimming or recipe.quantization_start is not None
    return not (changes or recipe.distills)


def _run(context: Context) -> Outcome:
    facts = _find_or_train(context)
    metrics = {"baseline/map50": facts["map50"]} if "map50" in facts else {}
    events: list[Event] = []
    if "dense_fingerprint" in facts:  # this run is a baseline, and others find it by this tag
        events.append(Tags({TAG: facts["dense_fingerprint"]}))
    return Outcome(metrics=metrics, facts=facts, events=events)


def _find_or_train(context: Context) -> dict[str, Any]:
    """The facts of a `Baseline`; of a dense run its ``dense_fingerprint``; nothing where none is wanted.

    Raises:
        ConfigError: ``recovery.baseline`` is no dense run on the same data.
        SparseExpError: the counterpart's training stopped.
    """
    experiment, wanted = context.experiment, context.experiment.recovery.baseline
    known = "sha256" in context.facts("fetch")
    whole = experiment.recipe.channels is None
    if known and whole and is_dense(context.recipe) and not experiment.recipe.oneshot:
        if wanted != "none":
            _log.info("The recipe %s is dense: this run is a baseline itself.", context.recipe.name)
        return {"dense_fingerprint": _fingerprint(context, experiment, context.recipe)}
    if wanted == "none":
        return {}
    if wanted != "auto":
        return _facts(context, _given(context, expanded(wanted)))
    if not known:
        _log.info("No baseline: recovery.baseline=auto needs the stage fetch. Name a run instead.")
        return {}
    return _facts(context, _start_itself(context) if experiment.recipe.oneshot else _counterpart(context))


def _facts(context: Context, baseline: Baseline) -> dict[str, Any]:
    """What is recorded; paths that move together with the run, as all outputs do, are relative to it."""
    here, output = context.run.path, Path(context.experiment.paths.output).resolve()
    together = [folder for folder in (here.parent, output) if here.is_relative_to(folder)]

    def recorded(path: str | None) -> str | None:
        moves = path and any(Path(path).is_relative_to(folder) for folder in together)
        return os.path.relpath(path, here) if path and moves else path

    facts = asdict(baseline)
    return facts | {key: recorded(facts[key]) for key in ("directory", "checkpoint")}


def _counterpart(context: Context) -> Baseline:
    from sparse_exp.recipes.recipe import Recipe

    dense = dense_experiment(context.experiment, context.recipe.epochs)
    recipe = Recipe.from_file(recipe_path(dense.recipe.file), dense.recipe.variables)
    mark = _fingerprint(context, dense, recipe)
    if found := _found(context, mark):
        return found
    with _alone(context, mark):
        return _found(context, mark) or _train(context, dense, mark)


def _found(context: Context, mark: str) -> Baseline | None:
    needs_weights = context.experiment.recipe.teacher == "baseline"
    for found in _candidates(context, mark):
        if found.checkpoint or not needs_weights:
            where = found.directory or "a run whose files are gone"
            _log.info("The dense baseline was %s: %s, mAP50 %.3f.", found.origin, where, found.map50)
            return found
    return None


@contextmanager
def _held(context: Context) -> Iterator[None]:
    """Let others that need this run as their baseline wait while it trains and is evaluated.

    Nothing happens where the run is not dense, or was evaluated before.
    """
    mark = context.facts("baseline").get("dense_fingerprint")
    done = Run.find(context.run.path)
    if mark is None or (done is not None and done.dense_fingerprint == mark):
        yield
        return
    with _alone(context, mark):
        yield


def _alone(context: Context, mark: str) -> AbstractContextManager[None]:
    """The lock of the dense runs of a fingerprint, for all processes that use this cache."""
    lock = context.cache / "locks" / f"dense-{mark}.lock"
    return exclusive(lock, "The dense baseline is being trained", label=f"the run {context.run.path.name}")


def dense_experiment(experiment: Experiment, epochs: float) -> Experiment:
    """The dense counterpart of an experiment, which needs a run directory of its own.

    Args:
        experiment: the sparse one.
        epochs: length of its training.
    """
    dense = copy.deepcopy(experiment)
    dense.name, dense.stages = f"{experiment.name}-dense", list(NEEDED)
    dense.recipe = RecipeConfig(name="dense", file="dense.md", variables={"num_epochs": float(epochs)})
    dense.recovery = RecoveryConfig(baseline="none")
    dense.checkpoint, dense.resume, dense.overwrite, dense.publish = None, None, False, None
    dense.tracker.register = dense.tracker.alias = None
    return dense


def _train(context: Context, dense: Experiment, mark: str) -> Baseline:
    _place(context.run, dense, mark)
    _log.info("Training the dense baseline for %g epochs in %s.", context.recipe.epochs, dense.paths.run)
    kept = [word for word in context.run.state.get("overrides", []) if not word.startswith(_REPLACED)]
    own = ["recipe=dense", f"recipe.variables.num_epochs={context.recipe.epochs:g}"]
    member = context.sweep and replace(context.sweep, job=None)
    context.run_nested(dense, [*kept, *own, f"stages=[{','.join(NEEDED)}]"], member)
    trained = read_baseline(Path(dense.paths.run), "trained")
    if trained is None:
        raise StageFailed(f"The dense baseline in {dense.paths.run} left no result. Its log is there.")
    _log.info("The dense baseline has mAP50 %.3f. Going on with the run itself.", trained.map50)
    return trained


def _place(run: Run, dense: Experiment, mark: str) -> None:
    """Let a counterpart go on where the run has begun it, else begin in a directory that is nobody's."""
    begun = run.state.get("counterpart", {})
    directory = (run.path / begun.get("directory", "")).resolve()
    beside = directory.is_dir() and directory.parent == run.path.parent  # as `claim` made it
    if begun.get("fingerprint") != mark or not beside:
        directory = claim(run.path.with_name(f"{run.path.name}-dense"))
        place = os.path.relpath(directory, run.path)
        run.update(counterpart={"fingerprint": mark, "directory": place})
    dense.paths.run = str(directory)
    dense.resume = str(directory) if (directory / MANIFEST).is_file() else None


def _start_itself(context: Context) -> Baseline:
    """Of a recipe that is applied without training: the start checkpoint, which then was trained before."""
    from sparse_exp.training.start import load_start

    start, classes, layout = context.start, context.dataset.names, context.precision.memory_format
    model, _ = load_start(start, context.experiment.model.size, classes, seed=context.experiment.seed)
    model.to(context.device).to(memory_format=layout)
    result = context.validation().evaluate_model(model, layout, description="Evaluating the start")
    return Baseline(result.map50, "", str(start.file.path) if start else None, "the start")


def _given(context: Context, directory: Path) -> Baseline:
    baseline, run = read_baseline(directory, "given"), Run.find(directory)
    do = "Give the directory of a finished run of recipe=dense, or set recovery.baseline=auto."
    if baseline is None or run is None:
        raise ConfigError(expected("recovery.baseline", "a run with a result", str(directory), do))
    phase = run.facts("evaluate").get("phase")
    if phase != "dense":
        raise ConfigError(expected(f"the baseline {directory}", "a dense run", phase, do))
    digest, own = run.facts("fetch").get("dataset"), context.dataset.digest
    if digest != own:
        raise ConfigError(expected(f"the data of the baseline {directory}", f"{own[:12]}...", digest, do))
    return baseline


def _candidates(context: Context, mark: str) -> Iterator[Baseline]:
    """Finished runs of that fingerprint: from MLflow, newest first, then from disk."""
    experiment = context.experiment
    for tracked in find_runs(experiment.tracker, Path(experiment.paths.mlflow), TAG, mark):
        directory = Path(tracked.tags.get("run.directory", ""))
        if _is_of(directory, mark) and (local := read_baseline(directory, "found in MLflow")):
            yield local
        elif MAP50 in tracked.metrics:
            yield Baseline(tracked.metrics[MAP50], "", None, "found in MLflow")
    for directory in _neighbours(context):
        if _is_of(directory, mark) and (local := read_baseline(directory, "found on disk")):
            yield local


def _is_of(directory: Path, mark: str) -> bool:
    run = Run.find(directory)
    return run is not None and run.dense_fingerprint == mark


def _neighbours(context: Context) -> list[Path]:
    """Directories of other runs, newest first: beside this one, and where runs lie by default."""
    beside = context.run.path.parent.glob(f"*/{MANIFEST}")
    by_default = Path(context.experiment.paths.output).glob(f"*/*/*/{MANIFEST}")  # runs/DAY, sweeps/NAME
    manifests = {path.resolve() for path in (*beside, *by_default)}
    return [path.parent for path in sorted(manifests, key=_written, reverse=True)]


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted just now
        return 0.0


def read_baseline(directory: Path, origin: str) -> Baseline | None:
    """The result of a run on disk.

    Args:
        directory: of the run.
        origin: see `Baseline`.

    Returns:
        None where there is no run, or it was not evaluated.
    """
    run = Run.find(directory)
    map50 = run.metrics("evaluate").get(MAP50) if run else None
    if run is None or map50 is None:
        return None
    checkpoint = run.trained_checkpoint
    there = str(checkpoint.resolve()) if checkpoint and checkpoint.is_file() else None
    return Baseline(float(map50), str(run.path), there, origin)


def _fingerprint(context: Context, dense: Experiment, recipe: Recipe) -> str:
    """Of all that the result of a dense run depends on; the recipe counts as it runs."""
    config, fetched = as_dict(dense), context.facts("fetch")
    parts = {
        "size": dense.model.size,
        "start": fetched["sha256"] or fetched["origin"],
        "data": context.dataset.digest,
        "imgsz": dense.dataset.imgsz,
        "trainer": config["trainer"],
        "optimizer": dense.recipe.optimizer,
        "precision": str(context.precision),
        "seed": dense.seed,
        **({"anchors": dense.model.anchors} if dense.model.anchors != "start" else {}),
    }
    return fingerprint(parts, recipe.text, __version__)


def baseline_content(experiment: Experiment) -> dict[str, str]:
    """The run that ``recovery.baseline`` names: what it found, and its checkpoint."""
    wanted = experiment.recovery.baseline
    given = read_baseline(expanded(wanted), "given") if wanted not in ("none", "auto") else None
    if given is None:
        return {}
    checkpoint = sha256_of(Path(given.checkpoint)) if given.checkpoint else ""
    return {"dense baseline": fingerprint(given.map50, checkpoint)}


def _possible_names(experiment: Experiment) -> Iterator[str]:
    if experiment.recovery.baseline != "none":  # a dense run has none
        yield "baseline/map50"


STAGE = Stage(
    name="baseline",
    run=_run,
    depends_on=("recovery",),
    content=lambda context: baseline_content(context.experiment),
    passes_on=lambda experiment: experiment.recipe.teacher == "baseline",
    # A trained baseline is shared by all runs of this machine, see `_candidates`.
    shared=lambda experiment: experiment.recipe.oneshot,
    computes=True,
    possible_names=_possible_names,
    held=_held,
    held_until="evaluate",
)
