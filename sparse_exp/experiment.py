"""One experiment from a checked configuration to its result: the ordered loop over the stages."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sparse_exp import __version__
from sparse_exp.config.plain import as_dict, as_yaml, recipe_path
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError, SparseExpError, StageFailed
from sparse_exp.files import fingerprint, sha256_of, write_json, write_text
from sparse_exp.hardware.targets import fit_to_host, mismatch_sentence
from sparse_exp.hints import resume_command
from sparse_exp.locks import waited_seconds, working
from sparse_exp.runs.conditions import current, packages
from sparse_exp.runs.directory import RunDirectory, StageRecord, locked
from sparse_exp.runs.past import JOB_TAG, OVERRIDES_TAG
from sparse_exp.stages import sharing
from sparse_exp.stages.base import Context, SweepMember
from sparse_exp.tracking import PARENT_TAG, Artifact, Metrics, RunInfo, create_tracker

_log = logging.getLogger(__name__)

# What each stage depends on, beyond everything the stages before it depend on.
_DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "fetch": ("model", "dataset"),
    "plan": ("recipe", "seed", "trainer"),  # of the recipe what it says, see _said_by_the_recipe
    "baseline": ("recovery",),
    "train": (),
    # From here on the checkpoint, where no stage before says which, see _given_checkpoint.
    "evaluate": (),
    "export": ("export",),  # the files that the target asks for, and the dense baseline
    "verify": (),  # the engines and variants, and the accuracy of the baseline
    "benchmark": ("hardware",),
    "report": ("name",),
    "publish": ("publish",),
    "register": ("tracker",),
}

_UP_TO_TRAINING = ("fetch", "plan", "baseline", "train")
# Stages during which others may measure: they wait for the network or a disk, or measure themselves.
_LIGHT = ("fetch", "benchmark", "publish", "register")
# Stages in which torch computes; with another number of threads it rounds otherwise. The plan sets its own.
_COMPUTES = ("baseline", "train", "evaluate", "export", "verify")

_KEPT_AT_THE_END = (
    "report.md",
    "result.json",
    "manifest.json",
    "history.json",
    "benchmark.json",
    "why.json",
    "sparse_exp.log",
)


def run(
    experiment: Experiment,
    hydra_files: Mapping[str, str],
    overrides: list[str] | None,
    sweep: SweepMember | None = None,
    *,
    whole: Experiment | None = None,
) -> Mapping[str, Any] | None:
    """Run the stages of an experiment, or with ``dry_run`` only show its plan.

    Args:
        experiment: the checked configuration.
        hydra_files: what Hydra composed, kept below ``.hydra/`` of the run.
        overrides: the command line, to make the run again; None: it is not known.
        sweep: the sweep that the run is a job of, if it is one.
        whole: what is recorded as the run's configuration, where this start does a part of it.

    Returns:
        What ``result.json`` holds; None for a dry run.

    Raises:
        SparseExpError: what stopped the run. The manifest names the stage and the reason, and the
            tracker knows the run as FAILED.
    """
    from sparse_exp.sparsity.recipe import Recipe

    chosen = experiment.recipe
    recipe = Recipe.from_file(_recipe_file(experiment), chosen.variables, num_epochs=chosen.num_epochs)
    asked, (experiment, mismatch) = experiment, fit_to_host(experiment)
    if experiment.dry_run:
        from sparse_exp.planning.dry_run import show

        show(experiment, recipe, mismatch)
        return None
    tracker = create_tracker(experiment.tracker, _store(experiment))
    with _opened(experiment, wait=sweep is not None) as directory:
        context = Context(experiment, directory, tracker, recipe, sweep, mismatch)
        with _logging_to(directory.path / "sparse_exp.log"), _terminated_as_interrupted():
            _write_conditions(context, whole or asked, hydra_files, overrides)
            if mismatch:
                _log.warning("%s", mismatch_sentence(experiment.hardware.name, mismatch))
            _run_tracked(context)
    return directory.result()


def _recipe_file(experiment: Experiment) -> Path:
    """Where the recipe lies: shipped, one's own, or fetched by its stub."""
    from sparse_exp.sources.cache import cache_directory
    from sparse_exp.sources.local import zoo_directory
    from sparse_exp.sources.recipes import fetch_recipe
    from sparse_exp.sources.stub import STUB_PREFIX

    file = experiment.recipe.file
    if file.startswith(STUB_PREFIX):
        zoo = zoo_directory(experiment.paths.zoo)
        return fetch_recipe(file, cache_directory(experiment.paths.cache), zoo)
    return recipe_path(file)


@contextmanager
def _opened(experiment: Experiment, *, wait: bool) -> Iterator[RunDirectory]:
    """The directory of the run, new or as it was left, which no other process touches meanwhile."""
    path = Path(experiment.resume or experiment.paths.run)
    if experiment.resume:
        RunDirectory.read(path)  # what is no run gets no lock either
    with locked(path, wait=wait):
        if experiment.resume:
            yield RunDirectory.reopen(path)
        else:
            yield RunDirectory.create(path, overwrite=experiment.overwrite)


def _store(experiment: Experiment) -> Path:
    return Path(experiment.paths.mlflow).absolute()


def _run_tracked(context: Context) -> None:
    """Run the stages, and tell manifest and tracker how it ended, whatever happens."""
    tracker, before = context.tracker, context.run.state.get("tracker_run_id")
    try:
        tracker.start(_run_info(context))
        context.run.update(tracker_run_id=tracker.run_id)
        for name in ("config.yaml", "recipe.md", "environment.txt"):
            tracker.log(Artifact(context.run.path / name))
        _run_stages(context, tell_all=tracker.run_id != before)
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if killed else " ".join(str(error).split())
        context.run.update(status="KILLED" if killed else "FAILED", failure=reason)
        _finish(context, "KILLED" if killed else "FAILED", reason)
        raise
    context.run.update(status="FINISHED", failure=None)
    _finish(context, "FINISHED", "")


def _run_stages(context: Context, *, tell_all: bool) -> None:
    """Run one stage after the other; ``tell_all``: the tracker knows nothing of those that are kept."""
    from sparse_exp.stages.baseline import STAGES as OF_A_BASELINE
    from sparse_exp.stages.baseline import as_baseline

    mark = ""
    with ExitStack() as others_wait:
        for stage in context.experiment.stages:
            if stage not in OF_A_BASELINE:
                others_wait.close()
            done = _run_stage(context, stage, mark, tell_kept=tell_all)
            mark = mark if stage == "baseline" and not _trains_on_baseline(context) else done
            if stage == "baseline":
                others_wait.enter_context(as_baseline(context))


def _finish(context: Context, status: Any, reason: str) -> None:
    for name in _KEPT_AT_THE_END:
        if (context.run.path / name).is_file():
            context.tracker.log(Artifact(context.run.path / name))
    context.tracker.finish(status, reason)


def _run_info(context: Context) -> RunInfo:
    from sparse_exp.hardware import host_facts

    experiment = context.experiment
    tags = {
        "model": experiment.model.name,
        "recipe": experiment.recipe.name,
        "dataset": experiment.dataset.name,
        "hardware": experiment.hardware.name,
        "host.cpu": host_facts().cpu,
        "sparse_exp.version": __version__,
        "run.directory": str(context.run.path),
        OVERRIDES_TAG: json.dumps(context.run.state.get("overrides")),
    }
    if context.sweep:
        tags["sweep"] = context.sweep.directory.name
        tags |= {PARENT_TAG: context.sweep.parent} if context.sweep.parent else {}
        tags |= {JOB_TAG: str(context.sweep.job)} if context.sweep.job is not None else {}
    return RunInfo(
        name=experiment.name,
        experiment=experiment.tracker.experiment,
        config=as_dict(experiment),
        tags=tags,
        directory=context.run.path,
        run_id=context.run.state.get("tracker_run_id"),
    )


def _run_stage(context: Context, stage: str, before: str, *, tell_kept: bool) -> str:
    """Run one stage, or skip it when it is finished; returns the fingerprint the next builds on."""
    mark = _fingerprint(context, stage, before)
    if context.run.is_finished(stage, mark):
        _log.info("== %s: finished before, kept", stage)
        if tell_kept:
            _tell(context, stage, replay=True)
        return mark
    _log.info("== %s", stage)
    context.mark = mark
    context.run.update(stage=stage)
    with sharing.turn(context, stage, mark):
        record = sharing.take_over(context, stage, mark)
        if record:
            context.run.record(stage, record)
        else:
            _work(context, stage, mark)
    result = write_json(context.run.path / "result.json", context.run.result())
    _log.debug("%s written", result)
    _tell(context, stage, replay=record is not None)
    return mark


def _work(context: Context, stage: str, mark: str) -> None:
    """Do a stage and record it."""
    from sparse_exp.stages.registry import STAGES

    started = time.monotonic() - waited_seconds()
    try:
        with nullcontext() if stage in _LIGHT else working(), _threads(context, stage):
            outcome = STAGES[stage](context)
    except SparseExpError:
        _log.debug("Stage %s stopped", stage, exc_info=True)
        raise
    except Exception as error:
        _log.debug("Stage %s failed", stage, exc_info=True)
        if _interrupted(error):
            raise KeyboardInterrupt from error
        raise StageFailed(_failure(context, stage, error)) from error
    seconds = time.monotonic() - waited_seconds() - started
    outputs = context.run.digests(outcome.files)
    context.run.record(stage, StageRecord(mark, outputs, outcome.metrics, seconds, outcome.facts))
    for path in outcome.spent:
        path.unlink(missing_ok=True)


def _threads(context: Context, stage: str) -> AbstractContextManager[None]:
    """The threads that torch computes a stage with; all of them where a training shares them out."""
    if stage not in _COMPUTES:
        return nullcontext()
    from sparse_exp.training.threads import using_threads

    return using_threads(context.threads * context.experiment.trainer.devices)


def _tell(context: Context, stage: str, *, replay: bool) -> None:
    """Let the tracker know what a stage found; ``replay``: of one that was not done now, epochs included."""
    from sparse_exp.stages.registry import announce

    announce(context, stage, replay=replay)
    record = context.run.records[stage]
    numbers = {name: float(v) for name, v in record.metrics.items() if isinstance(v, float | int)}
    # A tracker shows the value of the last step; that of the final model is to win over those of epochs.
    last = round(100 * context.recipe.epochs)
    context.tracker.log(Metrics({**numbers, f"time/{stage}_s": record.seconds}, step=last))


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: torch.save, cut off while it writes, raises one of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _failure(context: Context, stage: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    log = context.run.path / "sparse_exp.log"
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        do = "Make trainer.batch_size smaller."
        return f"The stage {stage} ran out of memory. {do} Its traceback is in {log}."
    if isinstance(error, OSError) and error.errno == 28:
        do = f"Free some space, then go on with: {resume_command(context.run.path)}"
        return f"The disk is full (stage {stage}). {do}"
    return f"The stage {stage} failed: {type(error).__name__}: {first} Its traceback is in {log}."


def _fingerprint(context: Context, stage: str, before: str) -> str:
    """Digest of all that a stage depends on: where it is the same, stages are kept, and shared by jobs."""
    config = as_dict(context.experiment)
    del config["dataset"]["workers"]  # any number of them gives the same images: it may change half-way
    parts = {key: config[key] for key in _DEPENDS_ON[stage]}
    if stage == "fetch":
        parts["start"] = "train" in context.experiment.stages  # which is fetched for a training only
    if stage == "plan":
        parts["recipe"] = _said_by_the_recipe(context, config["recipe"])
    if stage == "train" and _trains_on_baseline(context):
        parts["teacher"] = _teacher(context)
    if not before and stage != "fetch":  # whose mark would say it
        parts |= {key: config[key] for key in ("dataset", "seed")}
    if stage == next((s for s in context.experiment.stages if s not in _UP_TO_TRAINING), None):
        parts["checkpoint"] = _given_checkpoint(context)  # the stages behind it build on its mark
    if stage == "export":
        parts |= _exported(context)
    if stage == "verify":
        parts["baseline"] = context.facts("baseline").get("map50")
        parts["engines"] = context.experiment.hardware.engines
        parts["variants"] = sorted(context.experiment.hardware.variants)
    return fingerprint(stage, before, parts, __version__)


def _given_checkpoint(context: Context) -> str | None:
    """Digest of a checkpoint that was trained before; None where this training makes it, or there is none."""
    if "train" in context.experiment.stages and not context.experiment.checkpoint:
        return None
    try:
        return sha256_of(context.checkpoint)
    except (ConfigError, OSError):  # the stage that needs it says so
        return None


def _said_by_the_recipe(context: Context, config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as it runs, whatever it is called and however its variables came to their values."""
    in_the_text = ("name", "file", "variables", "num_epochs")
    return {"text": context.recipe.text, **{k: v for k, v in config.items() if k not in in_the_text}}


def _exported(context: Context) -> dict[str, Any]:
    """What the exported files depend on beside the training: which are wanted, and the dense baseline."""
    from sparse_exp.export.square import wanted_files
    from sparse_exp.stages.baseline import baseline_checkpoint

    hardware, baseline = context.experiment.hardware, baseline_checkpoint(context)
    wanted = wanted_files(hardware.engines, hardware.variants)
    return {"files": wanted, "dense": sha256_of(baseline) if baseline else None}


def _teacher(context: Context) -> list[Any]:
    """The baseline that a training learns from, wherever it lies and however it was found."""
    from sparse_exp.stages.baseline import baseline_checkpoint

    facts, file = context.facts("baseline"), baseline_checkpoint(context)
    return [facts.get("map50"), sha256_of(file) if file else facts.get("checkpoint")]


def _trains_on_baseline(context: Context) -> bool:
    """Whether the training depends on the dense counterpart, or only the result is held against it."""
    return context.experiment.recipe.teacher == "baseline"


def _write_conditions(
    context: Context, asked: Experiment, hydra_files: Mapping[str, str], overrides: list[str] | None
) -> None:
    """Record what was asked for, whatever of it this host can run, and with what it runs."""
    from sparse_exp.stages.train import write_recipe

    directory = context.run.path
    for name, text in hydra_files.items():
        write_text(directory / ".hydra" / name, text)
    write_text(directory / "config.yaml", as_yaml(asked))
    write_recipe(context)
    write_text(directory / "environment.txt", "\n".join(packages()) + "\n")
    context.run.update(
        name=context.experiment.name,
        **({} if overrides is None else {"overrides": overrides}),
        version=__version__,
        conditions=current(_recipe_file(context.experiment)),
        job=context.sweep.job if context.sweep else None,
    )


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Keep everything that is logged, debug lines and tracebacks included, in the run's log."""
    logger = logging.getLogger("sparse_exp")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    handler.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    previous = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(previous)
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does: recorded, tracked as KILLED, no process left behind."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whoever runs us there decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
