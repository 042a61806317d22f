"""The one door to MLflow.

MLflow is imported when a run starts (3 s) and used through its client only: the fluent functions
keep process-wide state, change the environment and fall back to ``./mlruns``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import MissingDependency, SparseExpError, expected
from sparse_exp.tracking import (
    Artifact,
    Dataset,
    Event,
    FoundRun,
    Metrics,
    Pause,
    Resume,
    RunInfo,
    Status,
    Tags,
)
from sparse_exp.tracking.outbox import Outbox, one_line, without_password
from sparse_exp.tracking.params import flatten, sanitize, shorten
from sparse_exp.tracking.source import source_tags

UNSENT = "unsent_tracking.jsonl"
_log = logging.getLogger(__name__)
_MAX_TAG_LENGTH = 8000
_MAX_DIGEST_LENGTH = 36
_PER_BATCH = 100
_LOCK_TIMEOUT_S = 120
_PATIENCE_AT_FINISH_S = 20.0
_SYSTEM_METRICS_EVERY_S = 5
_ENVIRONMENT = {
    # Of a server that does not answer, MLflow's own defaults wait many minutes before they say so.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@dataclass(frozen=True)
class _Finish:
    status: Status


class MlflowTracker:
    """Logs one run to MLflow: to a server that is named, or to SQLite in ``store``.

    Args:
        config: ``uri`` names a server or database; the environment's ``MLFLOW_TRACKING_URI`` wins.
        store: directory of ``mlflow.db`` and ``artifacts/`` where no server is named.
    """

    def __init__(self, config: TrackerConfig, store: Path) -> None:
        self.run_id: str | None = None
        self._config, self._store = config, store.absolute()
        self._uri, self._uri_from = tracking_uri(config, self._store)
        self._outbox = Outbox(self._send)
        self._monitor: Any = None
        self._finished = False

    def start(self, run: RunInfo) -> None:
        """Open the run and log its configuration as flat parameters; see `Tracker.start`."""
        self._directory = run.directory
        client_class = import_client()
        _log.info("Tracking to %s (%s)", without_password(self._uri), self._uri_from)
        try:
            self._open(client_class, run)
        except Exception as error:
            self._abandon()
            raise SparseExpError(self._unusable(error)) from error
        self._start_monitor(resume=False)

    def log(self, event: Event) -> None:
        """Send one event, or keep it until the server answers again; see `Tracker.log`."""
        if isinstance(event, Pause):
            self._stop_monitor()
        elif isinstance(event, Resume):
            self._start_monitor(resume=True)
        else:
            self._outbox.put(event)

    def finish(self, status: Status, reason: str = "") -> None:
        """Close the run; what cannot be sent is written to `UNSENT` in the run's directory."""
        if self.run_id is None or self._finished:
            return
        self._finished = True
        self._stop_monitor()
        if reason:
            self._outbox.put(Tags({"failure": reason, "mlflow.note.content": f"{status}: {reason}"}))
        self._outbox.put(_Finish(status))
        self._outbox.flush(_PATIENCE_AT_FINISH_S)
        self._keep_unsent()

    def _open(self, client_class: Callable[[str], Any], run: RunInfo) -> None:
        from mlflow.entities import Param

        with _ready_database(self._uri):
            self._client = client_class(self._uri)
            experiment = self._experiment(run.experiment)
        tags = {**source_tags(), **run.tags}
        if run.run_id is not None:
            self._client.update_run(run.run_id, status="RUNNING")
            self.run_id = run.run_id
            return
        created = self._client.create_run(experiment, tags=_clean_tags(tags), run_name=run.name)
        self.run_id = created.info.run_id
        params = [Param(key, value) for key, value in flatten(run.config).items()]
        for batch in _batches(params):
            self._client.log_batch(self.run_id, params=batch)

    def _experiment(self, name: str) -> str:
        """The ID of the experiment of that name, made if there is none."""
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        # A server places artifacts itself; for a database MLflow would take ./mlruns.
        remote = self._uri.startswith(("http:", "https:"))
        location = None if remote else (self._store / "artifacts").as_uri()
        try:
            return str(self._client.create_experiment(name, artifact_location=location))
        except Exception:  # another process may have been faster
            if found := self._client.get_experiment_by_name(name):
                return str(found.experiment_id)
            raise

    def _abandon(self) -> None:
        """Close a run that could not be started in full."""
        if self.run_id is not None:
            with suppress(Exception):
                self._client.set_terminated(self.run_id, "FAILED")
        self.run_id = None

    def _unusable(self, error: Exception) -> str:
        what = f"the MLflow tracking store ({self._uri_from})"
        do = f"({one_line(error)}) Start or repair it, name another with tracker.uri, or set tracker=none."
        return expected(what, "usable", without_password(self._uri), do)

    def _send(self, event: Any, milliseconds: int) -> None:
        if isinstance(event, Metrics):
            self._send_metrics(event, milliseconds)
        elif isinstance(event, Tags):
            self._send_tags(event)
        elif isinstance(event, Dataset):
            self._client.log_inputs(self.run_id, datasets=[_dataset_input(event)])
        elif isinstance(event, Artifact):
            self._client.log_artifact(self.run_id, str(event.path), event.folder or None)
        elif isinstance(event, _Finish):
            self._client.set_terminated(self.run_id, event.status, end_time=milliseconds)

    def _send_metrics(self, event: Metrics, milliseconds: int) -> None:
        from mlflow.entities import Metric

        finite = {key: float(value) for key, value in event.values.items() if math.isfinite(value)}
        if left_out := sorted(set(event.values) - set(finite)):
            _log.debug("Not tracked at step %s because they are not finite: %s", event.step, left_out)
        step = event.step or 0
        metrics = [Metric(sanitize(key), value, milliseconds, step) for key, value in finite.items()]
        for batch in _batches(metrics):
            self._client.log_batch(self.run_id, metrics=batch)

    def _send_tags(self, event: Tags) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in _clean_tags(event.values).items()]
        for batch in _batches(tags):
            self._client.log_batch(self.run_id, tags=batch)

    def _keep_unsent(self) -> None:
        path = self._directory / UNSENT
        try:
            if count := self._outbox.write_unsent(path):
                _log.warning("%d events could not be sent to MLflow; they are kept in %s", count, path)
        except OSError as error:
            _log.warning("Events that could not be sent to MLflow are lost: %s", one_line(error))

    def _start_monitor(self, *, resume: bool) -> None:
        if not self._config.system_metrics or self.run_id is None or self._monitor is not None:
            return
        try:
            self._monitor = _system_monitor(self.run_id, self._uri, resume=resume)
        except Exception as error:
            _log.warning("System metrics are not tracked: %s", one_line(error))

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None


def tracking_uri(config: TrackerConfig, store: Path) -> tuple[str, str]:
    """The address that runs are logged to, and what named it.

    ``MLFLOW_TRACKING_URI`` of the environment wins, then ``config.uri``, then SQLite in ``store``.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, "MLFLOW_TRACKING_URI"
    if config.uri:
        return config.uri, "tracker.uri"
    return f"sqlite:///{store.absolute() / 'mlflow.db'}", "paths.mlflow"


def search(config: TrackerConfig, store: Path, tag: str, value: str) -> list[FoundRun]:
    """Finished runs of all experiments that carry a tag, newest first; see `sparse_exp.tracking.find_runs`.

    Raises:
        MissingDependency: MLflow is not installed.
        Exception: the store does not answer.
    """
    client_class, (uri, _) = import_client(), tracking_uri(config, store)
    with _ready_database(uri):
        client = client_class(uri)
        experiments = [found.experiment_id for found in client.search_experiments()]
    wanted = f"tags.`{tag}` = '{value}' and attributes.status = 'FINISHED'"
    order = ["attributes.start_time DESC"]
    runs = client.search_runs(experiments, wanted, max_results=_PER_BATCH, order_by=order)
    return [FoundRun(run.info.run_id, run.data.tags, run.data.metrics) for run in runs]


def import_client() -> Callable[[str], Any]:
    """The class of MLflow's client, imported at the first call (3 s); it takes the address of a store.

    Raises:
        MissingDependency: MLflow is not installed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies', about each other
            from mlflow import MlflowClient
    except ImportError as error:
        do = f"({one_line(error)}) Install it with pip install mlflow, or set tracker=none."
        raise MissingDependency(expected("the package mlflow", "installed", "none", do)) from error
    # It only repeats what the outbox says.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    _log.debug("Imported mlflow in %.1f s", time.monotonic() - started)
    return MlflowClient


@contextmanager
def _ready_database(uri: str) -> Iterator[None]:
    """Hold the lock of a SQLite database, which processes that create it at once would corrupt.

    Raises:
        ValueError: the path cannot be written in a database address.
        sqlite3.Error: it is no database, or not writable; MLflow would try for minutes.
        OSError: its directory cannot be made.
    """
    if not uri.startswith("sqlite:///"):
        yield
        return
    import filelock

    if "?" in uri:
        raise ValueError("a path with a question mark does not work for SQLite")
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{database}.lock", timeout=_LOCK_TIMEOUT_S):
        with closing(sqlite3.connect(database, timeout=_LOCK_TIMEOUT_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
        yield


def _dataset_input(event: Dataset) -> Any:
    from mlflow.entities import Dataset as DatasetEntity
    from mlflow.entities import DatasetInput, InputTag

    scheme = (re.match(r"[a-z][a-z+]+(?=:)", event.source) or [""])[0]
    kind, key = ("http", "url") if scheme in ("http", "https") else (scheme or "local", "uri")
    entity = DatasetEntity(
        # MLflow keeps one input for each name and digest, so that splits need names of their own.
        name=f"{event.name}/{event.split}",
        digest=event.digest[:_MAX_DIGEST_LENGTH],
        source_type=kind,
        source=json.dumps({key: event.source}),
        profile=json.dumps({"images": event.size}),
    )
    tags = [InputTag("mlflow.data.context", event.split), InputTag("digest", event.digest)]
    return DatasetInput(entity, tags)


def _system_monitor(run_id: str, uri: str, *, resume: bool) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor: Any = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
        run_id, sampling_interval=_SYSTEM_METRICS_EVERY_S, resume_logging=resume, tracking_uri=uri
    )
    monitor.start()
    return monitor


def _clean_tags(tags: Any) -> dict[str, str]:
    return {sanitize(key): shorten(str(value), _MAX_TAG_LENGTH) for key, value in tags.items()}


def _batches(entities: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(entities), _PER_BATCH):
        yield entities[start : start + _PER_BATCH]
