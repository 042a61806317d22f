"""The seam of tracking: what every backend does, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparse_exp.tracking.events import Event, Finish, Status


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run when it starts.

    Args:
        name: shown in the list of runs.
        experiment: the group of runs it belongs to; made when it does not exist.
        config: the resolved configuration; nested dicts and lists of plain values.
        tags: the first tags, such as ``mlflow.parentRunId`` of a sweep's runs.
        directory: of the run's files.
        run_id: of an earlier start of the same run, which then goes on; None opens a new one. So does one
            that the backend does not have any more, or that has other parameters, which cannot be changed.
        told: all that the run has to tell so far, read from its directory, with the time of each event in
            seconds since 1970. A tracker that missed something sends it again from here.
        missed: whether an earlier start may not have told everything.
    """

    name: str
    experiment: str
    config: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    directory: Path = Path()
    run_id: str | None = None
    told: Callable[[], Iterable[tuple[Event | Finish, float]]] = tuple
    missed: bool = False


class Tracker(Protocol):
    """Logs one run.

    Attributes:
        run_id: the backend's name of it; None before the start or without a backend.
        address: of the backend, without a password; None without one.
    """

    run_id: str | None
    address: str | None

    def start(self, run: RunInfo) -> None:
        """Open the run and log its configuration and tags.

        Raises:
            MissingDependency: the backend's package is not installed.
            SparseExpError: the backend cannot be used; the message says what to do.
        """

    def log(self, event: Event, at: float | None = None) -> None:
        """Log one event that happened at a time (seconds since 1970; None: now).

        Never raises: a failure is warned of, and what was missed is sent again later.
        """

    def finish(self, status: Status, reason: str = "", at: float | None = None) -> bool:
        """Close the run, with the reason if it failed; see `log`. A second call does nothing.

        Returns:
            Whether the backend knows all that the run has told.
        """


class NoTracker:
    """The tracker that logs nothing."""

    run_id: str | None = None
    address: str | None = None

    def start(self, run: RunInfo) -> None:
        """Do nothing."""

    def log(self, event: Event, at: float | None = None) -> None:
        """Do nothing."""

    def finish(self, status: Status, reason: str = "", at: float | None = None) -> bool:
        """Do nothing: nobody asked to be told."""
        return True


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
