"""Past runs, read from their directories or from MLflow alike."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparse_exp.bounded_yaml import read_yaml
from sparse_exp.config.places import Places
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import ConfigError, expected
from sparse_exp.files import expanded, parse_json, read_json
from sparse_exp.hints import command_line
from sparse_exp.locks import is_held
from sparse_exp.runs.directory import LOCK, MANIFEST, Run, find_directories
from sparse_exp.tracking import PARENT_TAG, FoundRun
from sparse_exp.tracking.reading import read_runs

OVERRIDES_TAG = "overrides"
JOB_TAG = "sweep.job"
HOST_TAG = "host.name"
DIED = "its process is gone"
_RUN_ID = re.compile(r"[0-9a-f]{32}")
# Words of a command line that say where a run lies or how it is started, not what it is.
ABOUT_THE_PLACE = (
    "paths.run=", "resume=", "overwrite=", "dry_run=", "launcher=", "launcher.", "ray.", "sweep.",
)  # fmt: skip
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PastRun:
    """A run that was started some time.

    Attributes:
        name: what it was called.
        place: its directory, or the id of its MLflow run; what `sparse_exp.rerun` takes.
        status: ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``.
        metrics: the numbers of ``result.json``, or the last value of each metric in MLflow.
        overrides: the words of its command line; None where they are not recorded.
        run_id: MLflow's name of it; None where it was not tracked.
    """

    name: str
    place: str
    status: str
    metrics: Mapping[str, float]
    overrides: tuple[str, ...] | None
    run_id: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The overrides that say what the run is, without those about its place."""
        return tuple(word for word in self.overrides or () if not word.startswith(ABOUT_THE_PLACE))

    @property
    def command(self) -> str:
        """What to type to run it again: as it was typed, or where that is not known by its record."""
        if self.overrides is None:
            return command_line(self.place, module="sparse_exp.rerun")
        options = [word for folder in _own_config(Path(self.place)) for word in ("--config-dir", folder)]
        return command_line(*options, *self.words)


def select_runs(
    targets: Sequence[str],
    places: Places,
    *,
    experiment: str | None = None,
    only: str = "",
    newest: int | None = None,
) -> list[PastRun]:
    """The runs that somebody means.

    Args:
        targets: directories of runs or of sweeps (all runs below count), and ids of MLflow runs (of a
            sweep's parent: its children). Empty and no experiment: all below the outputs.
        places: where the outputs are, and which MLflow is meant.
        experiment: name of an MLflow experiment, all of whose runs count.
        only: of these, those that fit, in MLflow's language of filters; "": all.
        newest: of these, so many that started last; None: all.

    Returns:
        Each run once, in the order of targets; at least one.

    Raises:
        SparseExpError: a target is nothing of that, MLflow cannot be read, or there is no run.
    """
    if not targets and experiment is None:
        targets = [str(directory) for directory in places.runs if directory.is_dir()]
    runs: list[PastRun] = []
    for target in targets:
        if not expanded(target).is_dir() and not is_run_id(target):
            do = "Give a directory below outputs, or an id that MLflow shows."
            raise ConfigError(expected("RUN", "a run's or sweep's directory or MLflow id", target, do))
        if is_run_id(target) and not Path(target).is_dir():
            runs += _from_mlflow(places.tracker, places.mlflow, run_ids=[target])
        else:
            read = map(read_run, find_directories(expanded(target)))
            runs += [run for run in read if run is not None]
    if experiment is not None:
        runs += _from_mlflow(places.tracker, places.mlflow, experiment=experiment, only=only, newest=newest)
    once: dict[str, PastRun] = {}
    for run in runs:
        once.setdefault(run.run_id or str(Path(run.place).absolute()), run)
    if not once:
        where = ", ".join(targets) or " and ".join(map(str, places.runs))
        raise ConfigError(
            f"No run found in {where}. Give a run's or sweep's directory, or --experiment NAME."
        )
    return list(once.values())


def is_run_id(text: str) -> bool:
    """Whether a text looks like the id of an MLflow run: 32 hexadecimal digits."""
    return _RUN_ID.fullmatch(text) is not None


def read_run(directory: Path) -> PastRun | None:
    """The run in a directory; None (with a warning) where its manifest cannot be read."""
    run, result = Run.find(directory), read_json(directory / "result.json")
    if run is None or not run.status:
        _log.warning("%s has no manifest that can be read; it is left out.", directory)
        return None
    return PastRun(
        name=run.state.get("name", directory.name),
        place=str(directory),
        status=run.status,
        metrics={name: float(value) for name, value in result.items() if isinstance(value, int | float)},
        overrides=tuple(run.state["overrides"]) if "overrides" in run.state else None,
        run_id=run.tracker_run_id,
    )


def local_directory(run: FoundRun) -> Path | None:
    """The directory of a run of MLflow's, where it is on this machine and still that run's."""
    directory = Path(run.tags.get("run.directory", ""))
    there = Run.find(directory)
    return directory if there and there.tracker_run_id == run.run_id else None


def has_died(run: FoundRun) -> bool:
    """Whether a run of MLflow's that has not ended lies on this machine, and nobody works on it any more.

    The same path may be that of another run elsewhere. It is this one where this machine started it, or the
    record there names it: a run that is gone on with may have become another in MLflow.
    """
    directory = Path(run.tags.get("run.directory", "/nowhere"))
    if not (directory / MANIFEST).is_file():
        return False
    return (is_of_this_host(run) or local_directory(run) is not None) and not is_held(directory / LOCK)


def is_of_this_host(run: FoundRun) -> bool:
    """Whether this machine started it; False of one from before that was written down."""
    return run.tags.get(HOST_TAG) == platform.node()


def _from_mlflow(config: TrackerConfig, store: Path, **chosen: Any) -> list[PastRun]:
    found = read_runs(config, store, **chosen)
    parents = {run.tags[PARENT_TAG] for run in found if PARENT_TAG in run.tags}
    return [
        PastRun(
            name=run.name,
            place=run.run_id,
            status=run.status,
            metrics=run.metrics,
            overrides=tagged_overrides(run.tags),
            run_id=run.run_id,
        )
        for run in found
        if run.run_id not in parents
    ]


def tagged_overrides(tags: Mapping[str, str]) -> tuple[str, ...] | None:
    """The words of the command line of an MLflow run; None of one from before they were tagged."""
    try:
        words = parse_json(tags.get(OVERRIDES_TAG, "null"))
    except ValueError:  # longer than a tag may be, and cut
        return None
    return tuple(map(str, words)) if isinstance(words, list) else None


def _own_config(directory: Path) -> list[str]:
    """The directory that ``--config-dir`` named when a run was started."""
    try:
        recorded = read_yaml((directory / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))
        sources = recorded["hydra"]["runtime"]["config_sources"]
        return [str(source["path"]) for source in sources if source["provider"] == "command-line"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []
