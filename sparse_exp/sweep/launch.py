"""Open a sweep before its first job, and close it after the last, in the process that launches the jobs."""

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

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from sparse_exp.compare.comparison import FINISHED
from sparse_exp.config.places import apply_environment
from sparse_exp.config.plain import group, out_of_bounds
from sparse_exp.config.schema import LauncherConfig, RayConfig, SweepConfig, TrackerConfig
from sparse_exp.errors import ConfigError, SparseExpError
from sparse_exp.files import remove_parts
from sparse_exp.locks import exclusive
from sparse_exp.resolve import refuse_secrets, resolve
from sparse_exp.runs.directory import LOCK
from sparse_exp.runs.past import DIED, PastRun, has_died
from sparse_exp.stages.names import resolve_objective
from sparse_exp.sweep import naming
from sparse_exp.sweep.launchers import cancel_slurm_jobs, check_launcher, slurm_jobs, start_launcher
from sparse_exp.sweep.overview import FOLDER, Overview, read_overview
from sparse_exp.sweep.parent import STATE, open_parent, read_state, update_state
from sparse_exp.sweep.superseded import restore_superseded, supersede_jobs
from sparse_exp.tracking import Artifact, Metrics, Status, Tags, check_server, end_open_runs

_log = logging.getLogger(__name__)
_MULTIRUN = "multirun.yaml"  # Hydra's


@dataclass
class Sweep:
    """A sweep whose jobs this process launches.

    Attributes:
        directory: of the sweep.
        config: its own settings.
        tracker: where it is logged.
        store: see `sparse_exp.tracking.create_tracker`.
        dry_run: whether its jobs only print their plans.
        launcher: name of its launcher.
        submitted: numbers of Slurm's jobs of earlier starts.
        lock: holds the lock of the directory while the sweep is open.
    """

    directory: Path
    config: SweepConfig
    tracker: TrackerConfig
    store: Path
    dry_run: bool
    launcher: str = ""
    submitted: frozenset[str] = frozenset()
    lock: ExitStack = field(default_factory=ExitStack)


_open: Sweep | None = None


def open_sweep(config: DictConfig) -> None:
    """Check what can be checked before the first job, lock the sweep's directory, start its launcher.

    Args:
        config: the configuration as Hydra composed it, without the values that vary between the jobs.

    Raises:
        ConfigError: a setting, an objective or the launcher cannot be used, the tracking server does not
            answer, or another process runs this sweep.
    """
    global _open
    params: Any = OmegaConf.select(config, "hydra.sweeper.params")
    varied: Any = OmegaConf.to_container(params) if params else None
    naming.launched = naming.sweep_name(sys.argv[1:], varied)
    apply_environment(config, config.hydra.overrides.task)
    refuse_secrets(OmegaConf.to_container(config))
    if config.hydra.job.chdir:
        raise ConfigError(naming.NO_CHDIR)
    sweep = Sweep(
        directory=Path(config.hydra.sweep.dir),
        config=group(config, "sweep", SweepConfig),
        tracker=group(config, "tracker", TrackerConfig),
        store=Path(config.paths.mlflow).absolute(),
        dry_run=bool(config.dry_run),
    )
    launcher = group(config, "launcher", LauncherConfig)
    problems = [*out_of_bounds(sweep.config, "sweep."), *out_of_bounds(launcher, "launcher.")]
    if problems:
        raise ConfigError(problems)
    _check_objectives(config, sweep.config)
    ray = group(config, "ray", RayConfig)
    check_launcher(launcher, ray, config.hydra.runtime.choices.get("hydra/launcher"))
    if sweep.dry_run:
        _open = sweep
        return
    check_server(sweep.tracker, sweep.store)
    sweep.lock.enter_context(
        exclusive(sweep.directory / LOCK, f"The sweep {sweep.directory} is being run", wait=False)
    )
    start_launcher(launcher, ray)
    sweep.launcher, sweep.submitted = launcher.name, frozenset(slurm_jobs(sweep.directory))
    _open = sweep
    restore_superseded(sweep.directory)  # of a start that was killed
    remove_parts(sweep.directory / FOLDER, below=False)
    if sweep.config.rerun == "all":
        supersede_jobs(sweep.directory)
    command = shlex.join(["python", "-m", "sparse_exp", *sys.argv[1:]])
    update_state(
        sweep.directory,
        command=command,
        jobs_of=naming.launched,
        fixed=_fixed(config),
        launcher=launcher.name,
    )
    _log.info("Sweep %s in %s", sweep.directory.name, sweep.directory)


def _fixed(config: DictConfig) -> list[str]:
    """The words of the command that are the same for all jobs, as Hydra writes them down for each."""
    words = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    alike = [word for word in words if not word.is_sweep_override() and not word.is_delete()]
    return [f"{word.get_key_element()}={word.get_value_element_as_str()}" for word in alike]


def _check_objectives(config: DictConfig, sweep: SweepConfig) -> None:
    """Refuse objectives that no job will have, judging by the values that do not vary."""
    if not sweep.objectives:
        return
    composed = copy.deepcopy(config)
    with open_dict(composed):
        del composed["hydra"]
    try:
        experiment = resolve(composed)
    except ConfigError:  # each job reports it, or sets the value that is missing here
        return
    for name in sweep.objectives:
        resolve_objective(name, experiment)


def close_sweep(error: BaseException | None) -> str | None:
    """Close the open sweep: print and write its overview, end its tracked runs, release its directory.

    Does nothing where no sweep is open.

    Args:
        error: what ended the sweep early; None: it ran to its end.

    Returns:
        The last line for the user where jobs did not finish; None where all did.
    """
    global _open
    sweep, _open = _open, None
    if sweep is None:
        return None
    try:
        if isinstance(error, KeyboardInterrupt) and sweep.launcher == "slurm":
            cancel_slurm_jobs(slurm_jobs(sweep.directory) - sweep.submitted)
        restore_superseded(sweep.directory)
        overview = read_overview(sweep.directory, sweep.config.objectives, sweep.config.max_loss)
        if sweep.dry_run or not overview.jobs:
            return None
        return _report(sweep, overview, error)
    finally:
        sweep.lock.close()
        _remove_without_runs(sweep.directory)


def _report(sweep: Sweep, overview: Overview, error: BaseException | None) -> str | None:
    """Print and write the overview, and close the sweep's run in the tracker; returns the last line."""
    print(overview.text)
    overview.write(sweep.directory)
    status, reason = _status(overview.jobs, error)
    state = read_state(sweep.directory)
    if state.get("parent") and (state.get("open") or status != FINISHED):
        _close_parent(sweep, state, status, reason, overview)
    if not overview.failures:
        return None
    return f"{overview.headline}, see above. The same command goes on with the others."


def _status(jobs: Sequence[PastRun], error: BaseException | None) -> tuple[Status, str]:
    """The status that the sweep's run ends with, and the reason."""
    unfinished = sum(job.status != FINISHED for job in jobs)
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "interrupted"
    if unfinished:
        return "FAILED", f"{unfinished} of {len(jobs)} jobs did not finish"
    if error is not None:
        return "FAILED", " ".join(str(error).split()) or type(error).__name__
    return "FINISHED", ""


def _close_parent(
    sweep: Sweep, state: dict[str, Any], status: Status, reason: str, overview: Overview
) -> None:
    """End the runs of jobs that were killed, log the overview to the sweep's run, and end that."""
    try:
        tracker = open_parent(sweep.directory, sweep.tracker, sweep.store, state)
    except SparseExpError as error:
        _log.warning("The sweep's own run cannot be closed now; the same command does it. %s", error)
        return
    if tracker.run_id is not None:
        update_state(sweep.directory, parent=tracker.run_id)  # a new one where the former was deleted
        end_open_runs(sweep.tracker, sweep.store, tracker.run_id, has_died, "KILLED", DIED)
    tracker.log(Tags({"mlflow.note.content": overview.markdown}))
    failed = len(overview.failures)
    tracker.log(Metrics({"jobs/finished": len(overview.jobs) - failed, "jobs/failed": failed}))
    for path in (sweep.directory / FOLDER, sweep.directory / _MULTIRUN):
        if path.exists():
            tracker.log(Artifact(path))
    if tracker.finish(status, reason):
        update_state(sweep.directory, open=False)
    else:
        _log.warning("The sweep's own run does not hold all of it; the same command completes it.")


def _remove_without_runs(directory: Path) -> None:
    """Remove the directory of a sweep that made no run, because it was refused or a dry run."""
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
