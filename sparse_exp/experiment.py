"""One experiment from a checked configuration to its result: the ordered loop over the stages."""

from __future__ import annotations

import errno
import json
import logging
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_exp import __version__
from sparse_exp.config.plain import as_dict, as_yaml, recipe_path
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import SparseExpError, StageFailed
from sparse_exp.files import FULL, fingerprint, write_json, write_text
from sparse_exp.hardware import host_facts
from sparse_exp.hardware.deepsparse import using
from sparse_exp.hardware.targets import fit_to_host, mismatch_sentence
from sparse_exp.hints import command_line, resume_command
from sparse_exp.locks import waited_seconds, working
from sparse_exp.redaction import RedactingFormatter, without_secrets
from sparse_exp.runs.conditions import current, packages
from sparse_exp.runs.directory import CONFIG, MANIFEST, Run, StageRecord, claim, locked
from sparse_exp.runs.past import DIED, HOST_TAG, JOB_TAG, OVERRIDES_TAG, has_died
from sparse_exp.runs.replay import AT_THE_END, AT_THE_START, files_of, told_of, told_of_stage
from sparse_exp.sources.cache import cache_directory
from sparse_exp.sources.local import zoo_directory
from sparse_exp.sources.recipes import fetch_recipe
from sparse_exp.sources.stub import STUB_PREFIX
from sparse_exp.stages import sharing
from sparse_exp.stages.base import Context, Stage, SweepMember
from sparse_exp.stages.fingerprint import Fingerprint, pass_on, take_fingerprint
from sparse_exp.stages.registry import STAGES
from sparse_exp.tracking import PARENT_TAG, RunInfo, Status, as_plain, create_tracker, end_open_runs

if TYPE_CHECKING:
    from sparse_exp.recipes.recipe import Recipe

_log = logging.getLogger(__name__)
_NO_WRITE = (*FULL, errno.EROFS)


def run(
    experiment: Experiment,
    hydra_files: Mapping[str, str],
    overrides: list[str] | None,
    sweep: SweepMember | None = None,
    *,
    whole: Experiment | None = None,
    numbered: bool = False,
) -> Mapping[str, Any] | None:
    """Run the stages of an experiment, or with ``dry_run`` only show its plan.

    Args:
        experiment: the checked configuration.
        hydra_files: what Hydra composed, kept below ``.hydra/`` of the run.
        overrides: the command line, to make the run again; None: it is not known.
        sweep: the sweep that the run is a job of, if it is one.
        whole: what is recorded as the run's configuration, where this start does a part of it.
        numbered: nobody has named ``paths.run``: where that directory is taken, the next with a number is.

    Returns:
        What ``result.json`` holds; None for a dry run.

    Raises:
        SparseExpError: what stopped the run. The manifest names the stage and the reason, and the
            tracker knows the run as FAILED.
    """
    file = _recipe_file(experiment)
    asked, (experiment, mismatch) = experiment, fit_to_host(experiment)
    recipe = _read_recipe(experiment, file)
    if experiment.dry_run:
        from sparse_exp.planning.dry_run import show

        show(experiment, recipe, mismatch, partial(_read_recipe, file=file))
        return None
    tracker = create_tracker(experiment.tracker, Path(experiment.paths.mlflow).absolute())
    with _opened(experiment, wait=sweep is not None, numbered=numbered) as directory:
        context = Context(experiment, directory, tracker, recipe, sweep, mismatch, run_nested=_run_nested)
        with _logging_to(directory.path / "sparse_exp.log"), _terminated_as_interrupted():
            record = partial(_write_conditions, context, whole or asked, hydra_files, overrides, file)
            if mismatch:
                _log.warning("%s", mismatch_sentence(experiment.hardware.name, mismatch))
            with using(experiment.hardware.deepsparse_python):
                _run_tracked(context, whole or experiment, record)
    return directory.result()


def _run_nested(experiment: Experiment, overrides: list[str], sweep: SweepMember | None) -> None:
    run(experiment, {}, overrides, sweep)


def _read_recipe(experiment: Experiment, file: Path) -> Recipe:
    """The recipe as it runs, for the hardware that the experiment is fitted to."""
    from sparse_exp.quantization.choice import choose_quantization
    from sparse_exp.recipes.recipe import Recipe

    chosen = experiment.recipe
    quantization = choose_quantization(chosen, experiment.hardware, host_facts().isa)
    return Recipe.from_file(file, chosen.variables, chosen.num_epochs, chosen.engine, quantization)


def _recipe_file(experiment: Experiment) -> Path:
    """Where the recipe lies: shipped, one's own, or fetched by its stub."""
    file = experiment.recipe.file
    if file.startswith(STUB_PREFIX):
        zoo = zoo_directory(experiment.paths.zoo)
        return fetch_recipe(file, cache_directory(experiment.paths.cache), zoo)
    return recipe_path(file)


@contextmanager
def _opened(experiment: Experiment, *, wait: bool, numbered: bool) -> Iterator[Run]:
    """The directory of the run, new or as it was left, which no other process touches meanwhile."""
    path = Path(experiment.resume or experiment.paths.run)
    if experiment.resume:
        Run.read(path)  # what is no run gets no lock either
    elif numbered:
        path = claim(path)
        experiment.paths.run = str(path)
    with locked(path, wait=wait):
        if experiment.resume:
            yield Run.reopen(path, [stage.name for stage in STAGES.values() if stage.outside])
        else:
            yield Run.create(path, overwrite=experiment.overwrite)


def _write_conditions(
    context: Context,
    asked: Experiment,
    hydra_files: Mapping[str, str],
    overrides: list[str] | None,
    recipe: Path,
) -> None:
    """Record what was asked for, whatever of it this host can run, and with what it runs.

    Each stage's record names the conditions that it was done with; those of earlier starts stay.
    """
    directory, conditions = context.run.path, current(recipe)
    for name, text in hydra_files.items():
        write_text(directory / ".hydra" / name, text)
    write_text(directory / CONFIG, as_yaml(asked))
    context.run.write_recipe(context.run.composed_recipe or context.recipe.text)
    write_text(directory / "environment.txt", "\n".join(packages()) + "\n")
    environment = {**conditions, "packages": packages()}
    context.conditions = fingerprint(environment)
    context.run.update(
        name=context.experiment.name,
        **({} if overrides is None else {"overrides": overrides}),
        version=__version__,
        conditions=conditions,
        environments={**context.run.environments, context.conditions: environment},
        job=context.sweep.job if context.sweep else None,
        sweep_command=context.sweep.command if context.sweep else None,
    )


def _run_tracked(context: Context, whole: Experiment, record: Callable[[], None]) -> None:
    """Run the stages, and tell manifest and tracker how it ended, whatever happens.

    Args:
        context: of the run.
        whole: what the run is, with the stages of all its starts.
        record: writes down with what it runs.
    """
    try:
        with _failures_of(context, "the start of the run"):
            record()
            _start_tracking(context, whole)
        _run_stages(context)
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if killed else without_secrets(" ".join(str(error).split()))
        _finish(context, "KILLED" if killed else "FAILED", reason)
        raise
    _finish(context, "FINISHED", "")


def _start_tracking(context: Context, whole: Experiment) -> None:
    tracker, run, experiment = context.tracker, context.run, context.experiment
    info = _run_info(context, whole)
    run.update(told=False, started=time.time(), ended=None)
    tracker.start(info)
    if tracker.run_id is not None:  # else what an earlier start was tracked as stays
        run.update(tracker_run_id=tracker.run_id, tracker_address=tracker.address)
        if context.sweep is None:
            store = Path(experiment.paths.mlflow)
            end_open_runs(experiment.tracker, store, None, has_died, "KILLED", DIED)
    for event, at in files_of(run, AT_THE_START, run.state["started"]):
        tracker.log(event, at)


def _finish(context: Context, status: Status, reason: str) -> None:
    """Tell manifest and tracker how the run ended, each whether or not the other can be told."""
    run, ended = context.run, time.time()
    _note(run, status=status, failure=reason or None, ended=ended)
    for event, at in files_of(run, AT_THE_END, ended):
        context.tracker.log(event, at)
    told = context.tracker.finish(status, reason, ended)
    _note(run, told=told and context.tracker.run_id == run.tracker_run_id)
    if not told:
        again = command_line("sync", str(run.path), module="sparse_exp.tracking")
        _log.warning("The tracker does not know all of this run. When it answers again: %s", again)


def _note(run: Run, **state: Any) -> None:
    try:
        run.update(**state)
    except OSError as error:
        _log.warning("The end of the run is not in %s: %s.", run.path / MANIFEST, error.strerror)


def _run_info(context: Context, whole: Experiment) -> RunInfo:
    experiment = context.experiment
    tags = {
        "model": experiment.model.name,
        "recipe": experiment.recipe.name,
        "dataset": experiment.dataset.name,
        "hardware": experiment.hardware.name,
        "host.cpu": host_facts().cpu,
        HOST_TAG: platform.node(),
        "sparse_exp.version": __version__,
        "run.directory": str(context.run.path),
        OVERRIDES_TAG: json.dumps(context.run.state.get("overrides")),
    }
    if copied_from := context.run.state.get("copied_from"):
        tags["copied_from"] = str(copied_from)
    if context.sweep:
        tags["sweep"] = context.sweep.directory.name
        tags |= {PARENT_TAG: context.sweep.parent} if context.sweep.parent else {}
        tags |= {JOB_TAG: str(context.sweep.job)} if context.sweep.job is not None else {}
    return RunInfo(
        name=" ".join(filter(None, (experiment.name, context.sweep.label if context.sweep else ""))),
        experiment=experiment.tracker.experiment,
        config=as_dict(replace(experiment, stages=whole.stages, resume=None)),
        tags=tags,
        directory=context.run.path,
        run_id=context.run.tracker_run_id,
        told=lambda: told_of(context.run),
        missed=bool(context.run.records)
        and not (context.run.state.get("told") and context.run.tracker_run_id),
    )


def _run_stages(context: Context) -> None:
    """Run one stage after the other."""
    order, before, held_until = list(STAGES), Fingerprint(), ""
    with ExitStack() as held:
        for name in context.experiment.stages:
            stage = STAGES[name]
            if name != "fetch":
                with _failures_of(context, "the choice of batch and length"):
                    _settle(context)
            if held_until and order.index(name) > order.index(held_until):
                held.close()
            before = pass_on(stage, context, before, _run_stage(context, stage, before))
            if stage.held_until:
                with _failures_of(context, f"the stage {name}"):
                    held.enter_context(stage.held(context))
                held_until = stage.held_until


def _settle(context: Context) -> None:
    """Let the data choose what the configuration leaves open, once for a run: its later starts keep it."""
    if {"plan", "train"}.isdisjoint(context.experiment.stages) or context.settled:
        return
    from sparse_exp.planning.rules import Settled, is_open, settle

    experiment, kept = context.experiment, Settled.of(context.run.state.get("settled", {}))
    if is_open(rest := kept.applied(experiment)):
        found = settle(rest, context.recipe, context.dataset, context.precision, context.device)
        kept = kept.filled(found)
        context.run.update(settled=kept.as_data())
    context.experiment = kept.applied(experiment)
    if context.experiment != experiment:
        context.recipe = _read_recipe(context.experiment, _recipe_file(experiment))
        context.run.write_recipe(context.run.composed_recipe or context.recipe.text)
    context.settled = True


def _run_stage(context: Context, stage: Stage, before: Fingerprint) -> Fingerprint:
    """Run one stage, or keep it when it is finished; returns its fingerprint."""
    with _failures_of(context, f"the stage {stage.name}"):
        return _run_or_keep(context, stage, before)


def _run_or_keep(context: Context, stage: Stage, before: Fingerprint) -> Fingerprint:
    started = time.monotonic() - waited_seconds()
    context.run.update(stage=stage.name)
    own = _adopted(context, stage, take_fingerprint(context, stage, before))
    if context.run.is_finished(stage.name, own.mark):
        _log.info("== %s: finished before, kept", stage.name)
        return own
    _log.info("== %s%s", stage.name, _why_again(context, stage, own))
    context.mark, context.earlier_mark = own.mark, own.earlier
    with sharing.turn(context, stage, own.mark):
        record = sharing.take_over(context, stage, own.mark)
        if record:
            context.run.record(stage.name, replace(record, step=_last_step(context)))
        else:
            _work(context, stage, own, started)
    result = write_json(context.run.path / "result.json", context.run.result())
    _log.debug("%s written", result)
    # Of a training that was done here the tracker knows the epochs already.
    for event, at in told_of_stage(context.run, stage.name, epochs=record is not None):
        context.tracker.log(event, at)
    return own


def _adopted(context: Context, stage: Stage, own: Fingerprint) -> Fingerprint:
    """Let what a version before 0.2 recorded count as recorded now, where nothing has changed since."""
    record = context.run.records.get(stage.name)
    if record is None or record.parts or record.fingerprint != own.earlier:
        return own
    adopted = stage.adopt(record, context)
    if adopted is None:
        return replace(own, earlier=None)
    adopted = replace(adopted, fingerprint=own.mark, parts=dict(own.parts), step=_last_step(context))
    context.run.record(stage.name, adopted)
    return own


def _why_again(context: Context, stage: Stage, own: Fingerprint) -> str:
    """Why a stage that was finished is done once more; empty for one that was not finished."""
    record = context.run.records.get(stage.name)
    if record is None:
        return ""
    changed = own.changes(record)
    if record.fingerprint == own.mark:
        changed = [f"its file {name}" for name in context.run.changed_outputs(stage.name)]
    return f": done again, as {', '.join(changed)} changed" if changed else ": done again"


def _work(context: Context, stage: Stage, own: Fingerprint, started: float) -> None:
    """Do a stage and record it; ``started``: by the monotonic clock, less the time waited until then."""
    with (
        nullcontext() if stage.light else working(),
        _threads(context) if stage.computes else nullcontext(),
    ):
        outcome = stage.run(context)
    record = StageRecord(
        own.mark,
        context.run.digests(outcome.files),
        outcome.metrics,
        time.monotonic() - waited_seconds() - started,
        outcome.facts,
        ended=time.time(),
        events=[as_plain(event, context.run.path) for event in outcome.events],
        conditions=context.conditions,
        parts=dict(own.parts),
        step=_last_step(context),
    )
    context.run.record(stage.name, record)
    for path in outcome.spent:
        path.unlink(missing_ok=True)


def _last_step(context: Context) -> int:
    """A tracker shows the value of the last step: that of the final model wins over those of epochs."""
    return round(100 * context.recipe.epochs)


def _threads(context: Context) -> AbstractContextManager[None]:
    """The threads that torch computes a stage with; all of them where a training shares them out."""
    from sparse_exp.training.threads import using_threads

    return using_threads(context.threads * context.experiment.trainer.devices)


@contextmanager
def _failures_of(context: Context, what: str) -> Iterator[None]:
    """Turn what stops a stage, or the start of the run, into one line; the traceback goes to the log."""
    try:
        yield
    except SparseExpError:
        _log.debug("%s stopped", what, exc_info=True)
        raise
    except Exception as error:
        _log.debug("%s failed", what, exc_info=True)
        if any(isinstance(each, KeyboardInterrupt) for each in _chain(error)):
            raise KeyboardInterrupt from error
        raise StageFailed(_failure(context, what, error)) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all those behind it: torch.save, cut off while it writes, raises one of its own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _failure(context: Context, what: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    log, go_on = context.run.path / "sparse_exp.log", resume_command(context.run.path)
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        do = "Make trainer.batch_size smaller."
        return f"{_sentence(what)} ran out of memory. {do} Its traceback is in {log}."
    if str(error).startswith("DataLoader worker"):
        do = f"Where memory is short, set dataset.workers=0. Go on with: {go_on}"
        return f"A process that loads images was killed or has ended ({what.removeprefix('the ')}). {do}"
    refused = next(
        (each for each in _chain(error) if isinstance(each, OSError) and each.errno in _NO_WRITE), None
    )
    if refused is not None and refused.errno in FULL:
        do = f"Free some space, then go on with: {go_on}"
        return f"The disk is full ({what.removeprefix('the ')}). {do}"
    if refused is not None:
        do = f"Make it writable, then go on with: {go_on}"
        return f"{refused.filename or 'The disk'} cannot be written ({what.removeprefix('the ')}). {do}"
    return f"{_sentence(what)} failed: {type(error).__name__}: {first} Its traceback is in {log}."


def _sentence(what: str) -> str:
    return what[:1].upper() + what[1:]


class _RunLog(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Leave out what a full disk does not take: what the run itself cannot write ends it in one line."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Keep everything that is logged, debug lines and tracebacks included, in the run's log."""
    logger = logging.getLogger("sparse_exp")
    handler = _RunLog(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
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
    """Let SIGTERM, and SIGHUP of a terminal that is gone, end a run as Ctrl-C does.

    It is then recorded, tracked as KILLED, and leaves no process behind. Signals that are ignored, as by
    ``nohup``, stay so.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    caught = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    try:
        previous = {each: signal.signal(each, interrupt) for each in caught}
    except ValueError:  # not the main thread: whoever runs us there decides
        yield
        return
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
