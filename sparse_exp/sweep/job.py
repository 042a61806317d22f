"""Run one job of a sweep: keep it where it is finished, else go on with it or make it anew.

The job runs in the process that its launcher has chosen.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_exp import __version__
from sparse_exp.compare.comparison import FINISHED
from sparse_exp.config.plain import as_dict, recipe_path
from sparse_exp.config.schema import WITHOUT_EFFECT, Experiment, TrackerConfig
from sparse_exp.data import prepare
from sparse_exp.errors import ConfigError, SparseExpError, StageFailed, first_line
from sparse_exp.experiment import run
from sparse_exp.files import expanded, fingerprint, read_json, sha256_of, write_json
from sparse_exp.redaction import without_secrets
from sparse_exp.runs.conditions import code_differences
from sparse_exp.runs.directory import MANIFEST, Run, empty, locked
from sparse_exp.runs.past import JOB_TAG, OVERRIDES_TAG
from sparse_exp.sources.cache import cache_directory
from sparse_exp.sources.local import zoo_directory
from sparse_exp.sources.start import teacher_file
from sparse_exp.stages.base import SweepMember
from sparse_exp.stages.baseline import baseline_content
from sparse_exp.stages.fetch import content_now
from sparse_exp.stages.fingerprint import content_name
from sparse_exp.stages.names import resolve_objective
from sparse_exp.sweep.overview import REFUSED
from sparse_exp.sweep.parent import ensure_parent, read_state
from sparse_exp.sweep.superseded import superseded_manifest
from sparse_exp.tracking import PARENT_TAG, RunInfo, create_tracker, delete_run

_log = logging.getLogger(__name__)

ObjectiveValues = float | tuple[float, ...] | None


@dataclass(frozen=True)
class Job:
    """A job as its launcher hands it over.

    Attributes:
        number: from 0; the name of the directory begins with it.
        directory: directory of its run; Hydra has made it, and it may be empty.
        sweep: directory of the sweep.
        overrides: words of its command line.
        hydra_files: see `sparse_exp.experiment.run`.
    """

    number: int
    directory: Path
    sweep: Path
    overrides: list[str]
    hydra_files: Mapping[str, str]

    @property
    def earlier(self) -> Run | None:
        """The run of an earlier start; None where there was none."""
        return Run.find(self.directory)

    @property
    def command(self) -> str:
        """The command that it is a job of; several may use one directory, with the same ``sweep.name``."""
        return str(read_state(self.sweep).get("jobs_of", ""))


def run_job(job: Job, experiment: Experiment) -> ObjectiveValues:
    """Run a job, or keep it where an earlier start of the sweep has finished it.

    The job's directory is locked meanwhile. When a sweep is started twice, one waits for the other here.

    Args:
        job: the job.
        experiment: its checked configuration; ``resume`` is set here.

    Returns:
        The values of ``sweep.objectives``: one or a tuple; None where there are none.

    Raises:
        SparseExpError: the run failed, or the job finished with other settings before.
    """
    objectives = [resolve_objective(name, experiment) for name in experiment.sweep.objectives]
    if experiment.dry_run:
        run(experiment, job.hydra_files, job.overrides)
        return None
    with locked(job.directory, wait=True):
        (job.directory / REFUSED).unlink(missing_ok=True)
        if _is_finished(job, experiment):
            kept, command = Run.read(job.directory), job.command
            if kept.state.get("sweep_command") != command:
                kept.update(sweep_command=command)
        else:
            _prepare(job, experiment)
            parent = ensure_parent(job.sweep, experiment.tracker, Path(experiment.paths.mlflow))
            label = _label(job, experiment.name)
            member = SweepMember(job.sweep, parent, job.number, label, job.command)
            run(experiment, job.hydra_files, job.overrides, member)
        return _objective_values(job, objectives)


def _label(job: Job, name: str) -> str:
    """What the job has for itself in its sweep and its name does not say, such as ``seed=1``."""
    state = read_state(job.sweep)
    of_all = [*shlex.split(str(state.get("command", ""))), *state.get("fixed", [])]
    pairs = [word.lstrip("+").partition("=") for word in job.overrides if word not in of_all]
    own = [(key.rpartition(".")[2], value) for key, _, value in pairs if f"-{value}-" not in f"-{name}-"]
    return " ".join(f"{key}={value}" for key, value in own)


def _is_finished(job: Job, experiment: Experiment) -> bool:
    """Whether an earlier start finished the job with these settings, and it is to be kept as it is.

    Raises:
        ConfigError: the job finished with other settings.
    """
    earlier = job.earlier
    if earlier is None or earlier.status != FINISHED or experiment.sweep.rerun == "all":
        return False
    changed = _changed_settings(earlier, experiment)
    if changed:
        raise ConfigError(
            f"The job {job.directory} finished with other settings ({', '.join(changed)}). Keep it and "
            "choose another sweep.name, or make all jobs anew with sweep.rerun=all."
        )
    lost = next((name for stage in earlier.records for name in earlier.changed_outputs(stage)), None)
    if lost is not None:
        _log.warning("Job %d has finished, but %s changed or is gone: going on with it.", job.number, lost)
        return False
    code = earlier.state.get("conditions", {}).get("code", {})
    commit = f", commit {code['commit'][:12]}" if code.get("commit") else ""
    changed_code = "; the code is another now" if any(code_differences(code)) else ""
    _log.info("Job %d is finished (sparse_exp %s%s%s): kept.", job.number, __version__, commit, changed_code)
    return True


def _prepare(job: Job, experiment: Experiment) -> None:
    """Set ``resume``, so that the run goes on with an unfinished job; or empty the directory of the job.

    The directory is emptied where ``sweep.rerun`` asks for it.
    """
    superseded, earlier = superseded_manifest(job.directory), job.earlier
    if superseded or (earlier and experiment.sweep.rerun):
        state = read_json(superseded) if superseded else earlier.state if earlier else {}
        _delete_tracked_run(experiment, state.get("tracker_run_id"))
        empty(job.directory)
        experiment.resume = None
    elif earlier is None and (job.directory / MANIFEST).is_file():
        _log.warning("The manifest of job %d is damaged: the job is made anew.", job.number)
        empty(job.directory)
    elif earlier:
        if earlier.status != FINISHED:
            _log.info("Job %d was not finished (%s): going on with it.", job.number, earlier.status)
        experiment.resume = str(job.directory)
        if _changed_settings(earlier, experiment):  # parameters cannot be changed in a tracked run
            _delete_tracked_run(experiment, earlier.tracker_run_id)
            earlier.update(tracker_run_id=None)


def _delete_tracked_run(experiment: Experiment, run_id: str | None) -> None:
    """Delete the run of an earlier start in the tracker."""
    if run_id:
        delete_run(experiment.tracker, Path(experiment.paths.mlflow), run_id)


def _changed_settings(earlier: Run, experiment: Experiment) -> list[str]:
    """What changed since the job's record: keys, the recipe's file, our version, and the content of files.

    The content is read only where all else is the same.
    """
    then = _flat(_with_effect(earlier.config))
    now = _flat(_with_effect(as_dict(experiment)))
    changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    file = recipe_path(experiment.recipe.file)
    recipe = sha256_of(file) if file.is_file() else None
    if earlier.state.get("conditions", {}).get("recipe") != recipe:
        changed.append(f"the file {experiment.recipe.file}")
    if earlier.state.get("version") != __version__:
        changed.append("the version of sparse_exp")
    return changed or _changed_content(earlier, experiment)


def _changed_content(earlier: Run, experiment: Experiment) -> list[str]:
    """Files and data that are others now than those the job was made of, by their name in words.

    What is no longer on this machine counts as unchanged.
    """
    cache, zoo = cache_directory(experiment.paths.cache), zoo_directory(experiment.paths.zoo)
    then = {name: digest for record in earlier.records.values() for name, digest in record.parts.items()}
    now = {content_name(name): digest for name, digest in baseline_content(experiment).items()}
    if facts := earlier.facts("fetch"):
        known = {"data set": facts.get("dataset"), "start checkpoint": facts.get("sha256")}
        then |= {content_name(name): str(digest) for name, digest in known.items()}
        found = content_now(experiment, facts, lambda: prepare(experiment.dataset, cache))
        now |= {content_name(name): digest for name, digest in found.items()}
    if teacher := teacher_file(experiment.recipe.teacher, cache, zoo, offline=True):
        now[content_name("teacher")] = sha256_of(teacher)
    if experiment.checkpoint and (file := expanded(experiment.checkpoint)).is_file():
        now["checkpoint"] = fingerprint(sha256_of(file))
    return [name for name, digest in now.items() if name in then and digest != then[name]]


def _with_effect(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that a job's results depend on; of the tracker, those of the registry."""
    tracker = config.get("tracker", {})
    registry = {key: tracker.get(key) for key in ("register", "alias")}
    others = {key: value for key, value in config.items() if key not in WITHOUT_EFFECT}
    return {**others, "tracker": registry}


def _flat(plain: Any, prefix: str = "") -> dict[str, str]:
    """The fingerprint of each value of nested mappings, under its full key."""
    if not isinstance(plain, Mapping) or not plain:
        return {prefix.rstrip("."): fingerprint(plain)}
    return {
        key: text for name, value in plain.items() for key, text in _flat(value, f"{prefix}{name}.").items()
    }


def _objective_values(job: Job, objectives: Sequence[str]) -> ObjectiveValues:
    result = read_json(job.directory / "result.json")
    missing = [name for name in objectives if not isinstance(result.get(name), int | float)]
    if missing:
        do = "Change sweep.objectives."
        raise StageFailed(f"The job {job.directory} left no number under {missing[0]}. {do}")
    values = tuple(float(result[name]) for name in objectives)
    return values if len(values) > 1 else values[0] if values else None


def record_failure(
    job: Job, name: str, tracker: TrackerConfig, store: Path, experiment: Experiment | None, error: Exception
) -> None:
    """Record a job that failed before its run began, in a manifest and in the tracker, so that it is seen.

    A run that is there from an earlier start stays as it is; if that had finished, the job was refused now.

    Args:
        job: the job.
        name: of the run.
        tracker: where the run would have been logged.
        store: see `sparse_exp.tracking.create_tracker`.
        experiment: None where the configuration did not pass its checks.
        error: why it failed.
    """
    reason = without_secrets(first_line(error))
    if earlier := job.earlier:
        if earlier.status == FINISHED:  # else the run has recorded it itself
            write_json(job.directory / REFUSED, {"reason": reason})
        return
    run = Run.create(job.directory, overwrite=False)
    state = {"name": name, "overrides": job.overrides, "version": __version__, "job": job.number}
    run.update(status="FAILED", failure=reason, sweep_command=job.command, **state)
    try:
        run.update(tracker_run_id=_track_failure(job, name, tracker, store, experiment, reason))
    except SparseExpError as second:
        _log.warning("The failed job is not tracked: %s", second)


def _track_failure(
    job: Job, name: str, config: TrackerConfig, store: Path, experiment: Experiment | None, reason: str
) -> str | None:
    tags = {"sweep": job.sweep.name, JOB_TAG: str(job.number), OVERRIDES_TAG: json.dumps(job.overrides)}
    tags["run.directory"] = str(job.directory)
    if parent := ensure_parent(job.sweep, config, store):
        tags[PARENT_TAG] = parent
    values = as_dict(experiment) if experiment else {"name": name}
    tracker = create_tracker(config, store)
    tracker.start(RunInfo(name, config.experiment, values, tags, job.directory))
    tracker.finish("FAILED", reason)
    return tracker.run_id
