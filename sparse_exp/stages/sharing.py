"""Stages that jobs of a sweep have in common are done by one of them and taken over by the others.

A stage's fingerprint says everything that it depends on, so jobs in which it is the same would do the same:
jobs that differ in `hardware` share all up to the exported files, those that differ in the recipe the start.
Who comes second waits for the first (`sparse_exp.locks` says why nobody waits for ever); where that one
fails, it tries itself. Files are taken over as hard links: nothing here changes a file in place.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sparse_exp.errors import ConfigError
from sparse_exp.files import landing
from sparse_exp.locks import exclusive
from sparse_exp.runs.directory import MANIFEST, Run, StageRecord
from sparse_exp.stages.base import Context, Stage

_log = logging.getLogger(__name__)
_LOCKS = ".locks"


@contextmanager
def turn(context: Context, stage: Stage, mark: str) -> Iterator[None]:
    """Let one job of the sweep at a time do, or take over, a stage; does nothing outside of sweeps.

    Args:
        context: of the run.
        stage: that is about to run.
        mark: its fingerprint.
    """
    if context.sweep is None or not stage.shared(context.experiment):
        yield
        return
    lock = context.sweep.directory / _LOCKS / f"{stage.name}-{mark}.lock"
    with exclusive(lock, f"The stage {stage.name} is being done", label=f"the job {context.run.path.name}"):
        yield


def take_over(context: Context, stage: Stage, mark: str) -> StageRecord | None:
    """Bring the result of another job's stage into this run.

    Args:
        context: of the run.
        stage: that is about to run.
        mark: its fingerprint.

    Returns:
        The record to enter, with the seconds that the stage took there. None where no job has finished the
        stage, or its files are no longer what it wrote.
    """
    if context.sweep is None or not stage.shared(context.experiment):
        return None
    for directory in _finished(context.sweep.directory, mark):
        if directory == context.run.path:
            continue
        try:
            other = Run.read(directory)
            record = _brought(other, context.run, stage.name, mark)
        except (ConfigError, OSError):  # made anew or deleted just now
            continue
        if record:
            _log.info("%s: taken over from the job %s", stage.name, record.shared_from)
            there = {key: value for key, value in other.environments.items() if key == record.conditions}
            context.run.update(environments={**context.run.environments, **there})
            return record
    return None


def _finished(sweep: Path, mark: str) -> list[Path]:
    """The directories of runs that may have finished a stage of that fingerprint, by path."""
    found = []
    for manifest in sorted(sweep.resolve().glob(f"*/{MANIFEST}")):
        try:
            if mark in manifest.read_text(encoding="utf-8"):
                found.append(manifest.parent)
        except OSError:
            continue
    return found


def _brought(other: Run, own: Run, stage: str, mark: str) -> StageRecord | None:
    if not other.is_finished(stage, mark):
        return None
    record = other.records[stage]
    for name in record.outputs:
        _link(other.path / name, own.path / name)
    return replace(record, shared_from=record.shared_from or other.path.name)


def _link(source: Path, destination: Path) -> None:
    """Give a file a second name, or a copy where that is not possible."""
    with landing(destination) as temporary:
        temporary.unlink(missing_ok=True)  # it may be a link itself, which a copy would write through
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
