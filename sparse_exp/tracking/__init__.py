"""Where a run is logged: small events in, one backend out.

The run's manifest is the truth and a tracker only an observer: once a run has started, a tracker
that fails warns and lets the run go on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import ConfigError, expected

PARENT_TAG = "mlflow.parentRunId"
_log = logging.getLogger(__name__)
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Metrics:
    """Numbers, at a step or (None) of the run as a whole; those that are not finite are left out."""

    values: Mapping[str, float]
    step: int | None = None


def epoch_metrics(record: Mapping[str, Any]) -> Metrics:
    """The numbers of a record of a training's history; a step is a hundredth of an epoch."""
    numbers = {name: value for name, value in record.items() if isinstance(value, float)}
    return Metrics(numbers, step=round(100 * record["epoch"]))


@dataclass(frozen=True)
class Tags:
    """Texts that runs are searched by; a later value replaces an earlier one."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Dataset:
    """One split of a data set that the run reads.

    Args:
        name: of the data set.
        digest: hash of its contents, hexadecimal.
        source: where it came from: a path, an ``http(s)`` address, or ``scheme:...``.
        split: ``train``, ``val`` ...
        size: images in the split.
    """

    name: str
    digest: str
    source: str
    split: str
    size: int


@dataclass(frozen=True)
class Artifact:
    """A file, or a directory with all below it, to keep with the run under ``folder``."""

    path: Path
    folder: str = ""


@dataclass(frozen=True)
class Model:
    """An ONNX file to register under a name that others load it by.

    Args:
        path: of the file.
        name: in the registry, which numbers its versions.
        alias: that is moved to this version, such as ``candidate``; None: none is.
        tags: of the version.
    """

    path: Path
    name: str
    alias: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pause:
    """From here on the machine belongs to the run alone: system metrics stop."""


@dataclass(frozen=True)
class Resume:
    """System metrics go on."""


Event = Metrics | Tags | Dataset | Artifact | Model | Pause | Resume


_KINDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Metrics, Tags, Dataset, Artifact, Model)}


def as_plain(event: Event, directory: Path) -> dict[str, Any]:
    """An event as plain data.

    Args:
        event: not `Pause` or `Resume`, which are of the moment.
        directory: of the run; paths below it are written relative to it.
    """
    values = {item.name: getattr(event, item.name) for item in fields(event)}
    if "path" in values:
        path, here = Path(values["path"]).absolute(), directory.absolute()
        values["path"] = str(path.relative_to(here) if path.is_relative_to(here) else path)
    return {"event": type(event).__name__.lower(), **values}


def from_plain(plain: Mapping[str, Any], directory: Path) -> Event:
    """The event of `as_plain`.

    Raises:
        KeyError, TypeError: it is none.
    """
    values = {name: value for name, value in plain.items() if name != "event"}
    if "path" in values:
        values["path"] = directory / values["path"]
    event: Event = _KINDS[plain["event"]](**values)
    return event


@dataclass(frozen=True)
class Finish:
    """The end of a run, which trackers make an event of so that it can wait like others."""

    status: Status
    reason: str = ""


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run when it starts.

    Args:
        name: shown in the list of runs.
        experiment: the group of runs it belongs to; made when it does not exist.
        config: the resolved configuration; nested dicts and lists of plain values.
        tags: the first tags, such as ``mlflow.parentRunId`` of a sweep's runs.
        directory: of the run's files; what could not be sent is kept there.
        run_id: of an earlier start of the same run, which then goes on; None opens a new one.
    """

    name: str
    experiment: str
    config: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    directory: Path = Path()
    run_id: str | None = None


class Tracker(Protocol):
    """Logs one run; ``run_id`` is the backend's name of it, None before the start or without one."""

    run_id: str | None

    def start(self, run: RunInfo) -> None:
        """Open the run and log its configuration and tags.

        Raises:
            MissingDependency: the backend's package is not installed.
            SparseExpError: the backend cannot be used; the message says what to do.
        """

    def log(self, event: Event) -> None:
        """Log one event. Never raises: a failure is warned of and the event is sent again later."""

    def finish(self, status: Status, reason: str = "") -> None:
        """Close the run, with the reason if it failed. Never raises; a second call does nothing."""


class NoTracker:
    """The tracker that logs nothing."""

    run_id: str | None = None

    def start(self, run: RunInfo) -> None:
        """Do nothing."""

    def log(self, event: Event) -> None:
        """Do nothing."""

    def finish(self, status: Status, reason: str = "") -> None:
        """Do nothing."""


@dataclass(frozen=True)
class FoundRun:
    """A run that the backend knows.

    Args:
        run_id: the backend's name of it.
        tags: its tags.
        metrics: the last value of each of its metrics.
        name: shown in the list of runs.
        status: ``RUNNING``, ``FINISHED``, ``FAILED``, ``KILLED`` or ``SCHEDULED``.
        started: milliseconds since 1970.
    """

    run_id: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    name: str = ""
    status: str = ""
    started: int = 0


def find_runs(config: TrackerConfig, store: Path, tag: str, value: str) -> list[FoundRun]:
    """Finished runs of the backend that carry a tag, newest first.

    Args:
        config: the ``tracker`` group of the configuration.
        store: see `create_tracker`.
        tag: name of the tag.
        value: what it must be.

    Returns:
        Nothing without a backend, or (with a warning) when it cannot be asked.
    """
    if config.backend != "mlflow":
        return []
    from sparse_exp.tracking.mlflow import search

    try:
        return search(config, store, tag, value)
    except Exception as error:
        _log.warning("MLflow cannot be searched: %s", " ".join(str(error).split()))
        return []


def end_open_runs(config: TrackerConfig, store: Path, parent: str, status: Status, reason: str) -> int:
    """Close the runs of a sweep that nobody goes on with: their process is gone, and they say RUNNING.

    Args:
        config: the ``tracker`` group of the configuration.
        store: see `create_tracker`.
        parent: the backend's name of the sweep's own run.
        status: that they get.
        reason: why, in a sentence.

    Returns:
        How many were closed; 0 without a backend, or (with a warning) when it does not answer.
    """
    if config.backend != "mlflow":
        return 0
    from sparse_exp.tracking.mlflow import close_children

    try:
        return close_children(config, store, parent, Finish(status, reason))
    except Exception as error:
        _log.warning("Runs that did not end cannot be closed in MLflow: %s", " ".join(str(error).split()))
        return 0


def delete_run(config: TrackerConfig, store: Path, run_id: str) -> None:
    """Take a run out of the backend's lists, such as one whose job is made anew; MLflow can restore it.

    Args:
        config: the ``tracker`` group of the configuration.
        store: see `create_tracker`.
        run_id: the backend's name of it. Where it cannot be deleted a warning says so.
    """
    if config.backend != "mlflow":
        return
    from sparse_exp.tracking.mlflow import forget

    try:
        forget(config, store, run_id)
    except Exception as error:
        _log.warning("The former run cannot be deleted in MLflow: %s", " ".join(str(error).split()))


def create_tracker(config: TrackerConfig, store: Path) -> Tracker:
    """The tracker that ``config.backend`` names; nothing is opened before its ``start``.

    Args:
        config: the ``tracker`` group of the configuration.
        store: directory of the local database and artifacts, used when no server is named.

    Raises:
        ConfigError: there is no such backend.
    """
    if config.backend == "none":
        return NoTracker()
    if config.backend != "mlflow":
        raise ConfigError(
            expected("tracker.backend", "mlflow or none", config.backend, "Choose one of these.")
        )
    from sparse_exp.tracking.mlflow import MlflowTracker

    return MlflowTracker(config, store)
