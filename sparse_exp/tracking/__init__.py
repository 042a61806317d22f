"""Where a run is logged: small events in, one backend out.

The run's manifest is the truth and a tracker only an observer: once a run has started, a tracker
that fails warns and lets the run go on. What it missed is sent again from the manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from sparse_exp.config.places import SQLITE
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import ConfigError, SparseExpError, expected
from sparse_exp.tracking.base import FoundRun, NoTracker, RunInfo, Tracker
from sparse_exp.tracking.events import (
    ENDED,
    PARENT_TAG,
    Artifact,
    Dataset,
    Event,
    Finish,
    Metrics,
    Model,
    Pause,
    Resume,
    Status,
    Tags,
    as_plain,
    epoch_metrics,
    from_plain,
)
from sparse_exp.tracking.mlflow import MlflowTracker, close_dead, connect, forget, search
from sparse_exp.tracking.store import tracking_uri, unusable

__all__ = [
    "ENDED", "PARENT_TAG", "Artifact", "Dataset", "Event", "Finish", "FoundRun", "Metrics", "Model",
    "NoTracker", "Pause", "Resume", "RunInfo", "Status", "Tags", "Tracker", "as_plain", "check_server",
    "create_tracker", "delete_run", "end_open_runs", "epoch_metrics", "find_runs", "from_plain",
]  # fmt: skip
_log = logging.getLogger(__name__)


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
    try:
        return search(config, store, tag, value)
    except Exception as error:
        _log.warning("MLflow cannot be searched: %s", " ".join(str(error).split()))
        return []


def end_open_runs(
    config: TrackerConfig,
    store: Path,
    parent: str | None,
    has_died: Callable[[FoundRun], bool],
    status: Status,
    reason: str,
) -> int:
    """Close runs that nobody goes on with: their process is gone, and they say RUNNING.

    Args:
        config: the ``tracker`` group of the configuration.
        store: see `create_tracker`.
        parent: the backend's name of the sweep's own run, whose children are looked at; None: all runs.
        has_died: whether the process of a run that says RUNNING is gone; others are left alone.
        status: that they get.
        reason: why, in a sentence.

    Returns:
        How many were closed; 0 without a backend, or (with a warning) when it does not answer.
    """
    if config.backend != "mlflow":
        return 0
    try:
        return close_dead(config, store, parent, has_died, Finish(status, reason))
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
    try:
        forget(config, store, run_id)
    except Exception as error:
        _log.warning("The former run cannot be deleted in MLflow: %s", " ".join(str(error).split()))


def check_server(config: TrackerConfig, store: Path) -> None:
    """Refuse a tracking server that does not answer; a local database is made when it is needed.

    It is asked by MLflow's own client, with the user, token, certificate and proxy that runs will use.

    Args:
        config: the ``tracker`` group of the configuration.
        store: see `create_tracker`.

    Raises:
        SparseExpError: nothing answers at its address, or it does not let this user in.
    """
    uri, named_by = tracking_uri(config, store)
    if config.backend != "mlflow" or uri.startswith(SQLITE):
        return
    try:
        connect(uri)
    except SparseExpError:
        raise
    except Exception as error:
        raise SparseExpError(unusable(uri, named_by, error)) from error


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
    return MlflowTracker(config, store)
