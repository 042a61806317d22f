"""One job of a sweep, in whatever process its launcher runs it: kept, gone on with, or made."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_exp import __version__
from sparse_exp.compare.comparison import FINISHED
from sparse_exp.config.plain import as_dict, recipe_path
from sparse_exp.config.schema import Experiment, TrackerConfig
from sparse_exp.errors import ConfigError, SparseExpError, StageFailed, first_line
from sparse_exp.files import fingerprint, read_json, sha256_of, write_json
from sparse_exp.runs.conditions import code_differences
from sparse_exp.runs.directory import MANIFEST, Run, empty, locked
from sparse_exp.runs.past import JOB_TAG, OVERRIDES_TAG
from sparse_exp.sources.cache import cache_directory
from sparse_exp.stages.base import SweepMember
from sparse_exp.stages.fetch import content_now
from sparse_exp.stages.fingerprint import content_name
from sparse_exp.stages.names import resolve_objective
from sparse_exp.sweep.aside import aside_of
from sparse_exp.sweep.parent import parent_of
from sparse_exp.tracking import PARENT_TAG, RunInfo, create_tracker, delete_run

_log = logging.getLogger(__name__)
# What says where and how a job runs, not what comes out of it.
_NOT_COUNTED = ("paths", "sweep", "launcher", "ray", "tracker", "resume", "overwrite", "dry_run")

Values = float | tuple[float, ...] | None


@dataclass(frozen=True)
class Job:
    """What a launcher hands to a job.

    Attributes:
        number: from 0; it begins the name of the directory.
        directory: of its run; made by Hydra, perhaps empty.
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
    def manifest(self) -> dict[str, Any]:
        """Of an earlier start; empty where there was none."""
        return read_json(self.directory / MANIFEST)


def run_job(job: Job, experiment: Experiment) -> Values:
    """Run a job, or keep what an earlier start of the sweep made of it.

    Nobody else works on the job's directory meanwhile: of two starts of a sweep one waits for the other.

    Args:
        job: its place.
        experiment: its checked configuration; ``resume`` and ``overwrite`` are set here.

    Returns:
        The values of ``sweep.objectives``: one or a tuple; None where there are none.

    Raises:
        SparseExpError: what stopped it, or it finished with other settings before.
    """
    from sparse_exp.experiment import run

    objectives = [resolve_objective(name, experiment) for name in experiment.sweep.objectives]
    if experiment.dry_run:
        run(experiment, job.hydra_files, job.overrides)
        return None
    with locked(job.directory, wait=True):
        if not _is_kept(job, experiment):
            _prepare(job, experiment)
            parent = parent_of(job.sweep, experiment.tracker, Path(experiment.paths.mlflow))
            member = SweepMember(job.sweep, parent, job.number)
            run(experiment, job.hydra_files, job.overrides, member)
        return _values(job, objectives)


def _is_kept(job: Job, experiment: Experiment) -> bool:
    """Whether the job finished before, with these settings.

    Raises:
        ConfigError: it finished with others.
    """
    manifest = job.manifest
    if manifest.get("status") != FINISHED or experiment.sweep.rerun == "all":
        return False
    changed = _changes(job, manifest, experiment)
    if changed:
        raise ConfigError(
            f"The job {job.directory} finished with other settings ({', '.join(changed)}). Keep it and "
            "choose another sweep.name, or make all jobs anew with sweep.rerun=all."
        )
    then = manifest.get("conditions", {}).get("code", {})
    commit = f", commit {then['commit'][:12]}" if then.get("commit") else ""
    another = "; the code is another now" if any(code_differences(then)) else ""
    _log.info("Job %d is finished (sparse_exp %s%s%s): kept.", job.number, __version__, commit, another)
    return True


def _prepare(job: Job, experiment: Experiment) -> None:
    """Go on with what there is of a job, or make it anew where ``sweep.rerun`` says so."""
    if (aside := aside_of(job.directory)) or (job.manifest and experiment.sweep.rerun):
        _forget(experiment, read_json(aside) if aside else job.manifest)
        empty(job.directory)
        experiment.resume = None
        return
    manifest = job.manifest
    if not manifest:
        return
    _log.info("Job %d was not finished (%s): going on with it.", job.number, manifest.get("status"))
    experiment.resume = str(job.directory)
    if _changes(job, manifest, experiment):  # the tracker does not let go of the former parameters
        _forget(experiment, manifest)
        write_json(job.directory / MANIFEST, {**manifest, "tracker_run_id": None})


def _forget(experiment: Experiment, manifest: Mapping[str, Any]) -> None:
    """Take the run of an earlier start out of the tracker's lists."""
    if run_id := manifest.get("tracker_run_id"):
        delete_run(experiment.tracker, Path(experiment.paths.mlflow), run_id)


def _changes(job: Job, manifest: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """What is not as the job's record has it: keys, the recipe's file, our version, and the content of files.

    The content is only looked at where all else is the same.
    """
    then = _flat(counted(_recorded(job.directory)))
    now = _flat(counted(as_dict(experiment)))
    keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    file = recipe_path(experiment.recipe.file)
    recipe = sha256_of(file) if file.is_file() else None
    if manifest.get("conditions", {}).get("recipe") != recipe:
        keys.append(f"the file {experiment.recipe.file}")
    changed = [*keys, *(["the version of sparse_exp"] if manifest.get("version") != __version__ else [])]
    return changed or _changed_content(job, experiment)


def _changed_content(job: Job, experiment: Experiment) -> list[str]:
    """Whether the data set or the start checkpoint is another now than the job's fetch stage found."""
    from sparse_exp.data import prepare

    run = Run.find(job.directory)
    facts = run.facts("fetch") if run else {}
    if not facts:
        return []
    cache = cache_directory(experiment.paths.cache)
    now = content_now(experiment, facts, lambda: prepare(experiment.dataset, cache))
    then = {"data set": facts.get("dataset"), "start checkpoint": facts.get("sha256")}
    return [content_name(name) for name, digest in now.items() if digest != then[name]]


def counted(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that the outcome of a job depends on.

    Args:
        config: nested plain values, as `sparse_exp.config.plain.as_dict` has them.
    """
    tracker = config.get("tracker", {})
    registered = {key: tracker.get(key) for key in ("register", "alias")}
    return {**{key: value for key, value in config.items() if key not in _NOT_COUNTED}, "tracker": registered}


def _recorded(directory: Path) -> dict[str, Any]:
    import yaml

    try:
        recorded = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _flat(plain: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(plain, Mapping) or not plain:
        return {prefix.rstrip("."): fingerprint(plain)}
    return {
        key: text for name, value in plain.items() for key, text in _flat(value, f"{prefix}{name}.").items()
    }


def _values(job: Job, objectives: Sequence[str]) -> Values:
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
    """Let manifest and tracker know of a job that failed before its run began, so that the gap is seen.

    Args:
        job: its place.
        name: of the run.
        tracker: where it would have been logged.
        store: see `sparse_exp.tracking.create_tracker`.
        experiment: None where the configuration did not pass its checks.
        error: what stopped it.
    """
    if job.manifest:  # the run knows it, or it is an earlier one, which stays as it is
        return
    reason = first_line(error)
    run = Run.create(job.directory, overwrite=False)
    state = {"name": name, "overrides": job.overrides, "version": __version__, "job": job.number}
    run.update(status="FAILED", failure=reason, **state)
    try:
        run.update(tracker_run_id=_track_failure(job, name, tracker, store, experiment, reason))
    except SparseExpError as second:
        _log.warning("The failed job is not tracked: %s", second)


def _track_failure(
    job: Job, name: str, config: TrackerConfig, store: Path, experiment: Experiment | None, reason: str
) -> str | None:
    tags = {"sweep": job.sweep.name, JOB_TAG: str(job.number), OVERRIDES_TAG: json.dumps(job.overrides)}
    tags["run.directory"] = str(job.directory)
    if parent := parent_of(job.sweep, config, store):
        tags[PARENT_TAG] = parent
    values = as_dict(experiment) if experiment else {"name": name}
    tracker = create_tracker(config, store)
    tracker.start(RunInfo(name, config.experiment, values, tags, job.directory))
    tracker.finish("FAILED", reason)
    return tracker.run_id
