"""A sweep from its launcher's side: what is checked before the first job, and how it is closed."""

from __future__ import annotations

import copy
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from sparse_exp.compare.comparison import FINISHED
from sparse_exp.config.plain import group, out_of_bounds
from sparse_exp.config.schema import LauncherConfig, RayConfig, SweepConfig, TrackerConfig
from sparse_exp.errors import ConfigError, SparseExpError
from sparse_exp.locks import exclusive
from sparse_exp.resolve import resolve
from sparse_exp.runs.directory import LOCK
from sparse_exp.runs.past import PastRun
from sparse_exp.stages.names import resolve_objective
from sparse_exp.sweep.aside import put_back, set_aside
from sparse_exp.sweep.launchers import check_launcher, start_launcher
from sparse_exp.sweep.parent import STATE, note_state, open_parent, read_state
from sparse_exp.sweep.summary import FOLDER, Summary, summarize
from sparse_exp.tracking import Artifact, Metrics, Status, Tags, end_open_runs
from sparse_exp.tracking.store import check_server

_log = logging.getLogger(__name__)
_MULTIRUN = "multirun.yaml"  # Hydra's


@dataclass
class Sweep:
    """A sweep while this process launches its jobs.

    Attributes:
        directory: of the sweep.
        config: its own settings.
        tracker: where it is logged.
        store: see `sparse_exp.tracking.create_tracker`.
        dry: its jobs only print their plans.
        lock: of its directory, held while it is open.
    """

    directory: Path
    config: SweepConfig
    tracker: TrackerConfig
    store: Path
    dry: bool
    lock: ExitStack = field(default_factory=ExitStack)


_open: Sweep | None = None


def open_sweep(config: DictConfig) -> None:
    """Refuse a sweep that cannot end well, and keep others out of its directory.

    Args:
        config: as Hydra composed it, without what varies between the jobs.

    Raises:
        ConfigError: an objective, the launcher or the tracking server is not there, or another process
            runs this sweep.
    """
    global _open
    sweep = Sweep(
        directory=Path(config.hydra.sweep.dir),
        config=group(config, "sweep", SweepConfig),
        tracker=group(config, "tracker", TrackerConfig),
        store=Path(config.paths.mlflow).absolute(),
        dry=bool(config.dry_run),
    )
    launcher = group(config, "launcher", LauncherConfig)
    problems = [*out_of_bounds(sweep.config, "sweep."), *out_of_bounds(launcher, "launcher.")]
    if problems:
        raise ConfigError(problems)
    _check_objectives(config, sweep.config)
    ray = group(config, "ray", RayConfig)
    check_launcher(launcher, ray)
    if sweep.dry:
        _open = sweep
        return
    check_server(sweep.tracker, sweep.store)
    sweep.lock.enter_context(
        exclusive(sweep.directory / LOCK, f"The sweep {sweep.directory} is being run", wait=False)
    )
    start_launcher(launcher, ray)
    _open = sweep
    put_back(sweep.directory)
    if sweep.config.rerun == "all":
        set_aside(sweep.directory)
    command = shlex.join(["python", "-m", "sparse_exp", *sys.argv[1:]])
    note_state(sweep.directory, command=command, launcher=launcher.name)
    _log.info("Sweep %s in %s", sweep.directory.name, sweep.directory)


def _check_objectives(config: DictConfig, sweep: SweepConfig) -> None:
    """Refuse a misspelt objective, as far as what does not vary says what there will be."""
    if not sweep.objectives:
        return
    alone = copy.deepcopy(config)
    with open_dict(alone):
        del alone["hydra"]
    try:
        experiment = resolve(alone)
    except ConfigError:  # each job says it, or sets what is missing here
        return
    for name in sweep.objectives:
        resolve_objective(name, experiment)


def close_sweep(error: BaseException | None) -> str | None:
    """Sum the open sweep up, and let no run of it be left open; does nothing where there is none.

    Args:
        error: what ended it before its time, if anything did.

    Returns:
        What to end with where jobs did not finish, each of which has been told of; None where they all did.
    """
    global _open
    sweep, _open = _open, None
    if sweep is None:
        return None
    try:
        put_back(sweep.directory)
        return _close(sweep, error)
    finally:
        sweep.lock.close()
        _tidy(sweep.directory)


def _close(sweep: Sweep, error: BaseException | None) -> str | None:
    summary = summarize(sweep.directory, sweep.config.objectives)
    if sweep.dry or not summary.jobs:
        return None
    print(summary.text)
    summary.write(sweep.directory)
    status, reason = _outcome(summary.jobs, error)
    state = read_state(sweep.directory)
    if state.get("parent") and (state.get("open") or status != FINISHED):
        _close_parent(sweep, state, status, reason, summary)
    if not summary.failures:
        return None
    return f"{summary.headline}, see above. The same command goes on with the others."


def _outcome(jobs: Sequence[PastRun], error: BaseException | None) -> tuple[Status, str]:
    bad = [job for job in jobs if job.status != FINISHED]
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "interrupted"
    if bad:
        return "FAILED", f"{len(bad)} of {len(jobs)} jobs did not finish"
    if error is not None:
        return "FAILED", " ".join(str(error).split()) or type(error).__name__
    return "FINISHED", ""


def _close_parent(sweep: Sweep, state: dict[str, Any], status: Status, reason: str, summary: Summary) -> None:
    try:
        tracker = open_parent(sweep.directory, sweep.tracker, sweep.store, state)
    except SparseExpError as error:
        _log.warning("The sweep's own run cannot be closed now; the same command does it. %s", error)
        return
    end_open_runs(sweep.tracker, sweep.store, state["parent"], "KILLED", "its process is gone")
    tracker.log(Tags({"mlflow.note.content": summary.markdown}))
    failed = len(summary.failures)
    tracker.log(Metrics({"jobs/finished": len(summary.jobs) - failed, "jobs/failed": failed}))
    for path in (sweep.directory / FOLDER, sweep.directory / _MULTIRUN):
        if path.exists():
            tracker.log(Artifact(path))
    if tracker.finish(status, reason):
        note_state(sweep.directory, open=False)
    else:
        _log.warning("The sweep's own run does not hold all of it; the same command completes it.")


def _tidy(directory: Path) -> None:
    """Leave nothing of a sweep that made no run, such as a refused one or a dry run."""
    if not directory.is_dir():
        return
    for folder in directory.iterdir():
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    left = {path.name for path in directory.iterdir()}
    if left <= {_MULTIRUN, STATE} and not read_state(directory).get("parent"):
        for name in left:
            (directory / name).unlink()
        directory.rmdir()
