"""The one door to MLflow.

MLflow is imported when a run starts (3 s) and used through its client only: the fluent functions
keep process-wide state, change the environment and fall back to ``./mlruns``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparse_exp.config.schema import WITHOUT_EFFECT, TrackerConfig
from sparse_exp.errors import MissingDependency, SparseExpError, expected
from sparse_exp.redaction import without_secrets
from sparse_exp.tracking.base import FoundRun, RunInfo
from sparse_exp.tracking.delivery import Delivery
from sparse_exp.tracking.description import NOTE_TAG, experiment_note
from sparse_exp.tracking.events import (
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
)
from sparse_exp.tracking.messages import one_line
from sparse_exp.tracking.params import flatten, sanitize, shorten
from sparse_exp.tracking.relocation import ARTIFACTS, relocate
from sparse_exp.tracking.source import source_tags
from sparse_exp.tracking.store import LOCAL, ready_database, tracking_uri, unusable

_log = logging.getLogger(__name__)
_MAX_TAG_LENGTH = 8000
_MAX_DIGEST_LENGTH = 36
_PER_BATCH, _PER_PAGE = 100, 200
_PATIENCE_AT_START_S, _PATIENCE_AT_FINISH_S = 1.0, 20.0
_SYSTEM_METRICS_EVERY_S, _SYSTEM_METRICS_MOST = 5, 2000  # of these are evenly spread, then the interval grows
_FAILURE_TAG = "failure"
_CONTINUES_TAG, _CONTINUED_TAG = "continues", "continued_by"
# Parameters that may differ while a tracked run goes on.
_MAY_DIFFER = (*WITHOUT_EFFECT, "stages", "publish")
_MOST_NAMED = 3
_MODEL_FOLDER, _MODEL_FILE, _SHA256_TAG = "registered_model", "model.onnx", "sha256"
_ENVIRONMENT = {
    # Of a server that does not answer, MLflow's own defaults wait many minutes before they say so.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class MlflowTracker:
    """Logs one run to MLflow: to a server that is named, or to SQLite in ``store``.

    Args:
        config: ``uri`` names a server or database; see `sparse_exp.tracking.store.tracking_uri`.
        store: directory of ``mlflow.db`` and ``artifacts/`` where no server is named.
    """

    def __init__(self, config: TrackerConfig, store: Path) -> None:
        self.run_id: str | None = None
        self._config, self._store = config, store.absolute()
        self._uri, self._uri_from = tracking_uri(config, self._store)
        self.address: str | None = without_secrets(self._uri)
        self._delivery: Delivery | None = None
        self._run: RunInfo | None = None
        self._monitor: Any = None

    def start(self, run: RunInfo) -> None:
        """Open the run and log its configuration as flat parameters; see `Tracker.start`.

        What an earlier start of the run could not send goes first. What a new run of MLflow's, which takes
        the place of an earlier one, is to know of the earlier starts is sent when the run ends: until then
        some of it may still be replaced.
        """
        client_class = import_client()
        _log.info("Tracking to %s (%s)", self.address, self._uri_from)
        try:
            self._open(client_class, run)
        except Exception as error:
            self._abandon()
            if isinstance(error, SparseExpError):
                raise
            raise SparseExpError(unusable(self._uri, self._uri_from, error)) from error
        self._run = run
        instead = run.run_id is not None and self.run_id != run.run_id
        send = RunWriter(self._client, str(self.run_id)).send
        self._delivery = Delivery(send, missed=run.missed or instead)
        if run.missed and not instead:
            self._delivery.send_again(run.told(), _PATIENCE_AT_START_S)
        self._start_monitor(resume=False)

    def log(self, event: Event, at: float | None = None) -> None:
        """Send one event; see `Tracker.log`."""
        if isinstance(event, Pause):
            self._stop_monitor()
        elif isinstance(event, Resume):
            self._start_monitor(resume=True)
        elif self._delivery is not None:
            self._delivery.put(event, time.time() if at is None else at)

    def finish(self, status: Status, reason: str = "", at: float | None = None) -> bool:
        """Close the run; what was missed is sent again, now or by ``sync``. See `Tracker.finish`."""
        if self._delivery is None or self._run is None:
            return True
        self._stop_monitor()
        delivery, run, self._delivery = self._delivery, self._run, None
        end = Finish(status, reason), time.time() if at is None else at
        if not delivery.missed:
            delivery.put(*end)
        if delivery.missed:
            again = delivery.send_again([*run.told(), end], _PATIENCE_AT_FINISH_S)
            if again.left:
                _log.warning("%d events could not be sent to MLflow: %s.", again.left, again.reason)
        return not delivery.missed

    def _open(self, client_class: Callable[[str], Any], run: RunInfo) -> None:
        from mlflow.entities import Param

        with ready_database(self._uri):
            if self._uri_from == LOCAL:
                for former in relocate(self._store):
                    _log.info("The artifacts of %s are in %s now.", former, self._store)
            self._client = client_class(self._uri)
            experiment = self._experiment(run.experiment)
        tags, params = {**source_tags(), **run.tags}, flatten(run.config)
        if run.run_id is not None:
            why_not = _why_not(self._client, run.run_id, params)
            if why_not is None:
                _reopen(self._client, run.run_id)
                self.run_id = run.run_id
                _set_tags(self._client, self.run_id, run.tags)  # its directory may have been moved
                return
            _log.warning("MLflow gets a new run in place of %s: %s.", run.run_id, why_not)
            tags[_CONTINUES_TAG] = run.run_id
        created = self._client.create_run(experiment, tags=_clean_tags(tags), run_name=run.name)
        self.run_id = created.info.run_id
        for batch in _batches([Param(key, value) for key, value in params.items()]):
            self._client.log_batch(self.run_id, params=batch)
        if run.run_id is not None:
            _succeed(self._client, run.run_id, created)

    def _experiment(self, name: str) -> str:
        """The ID of the experiment of that name, made if there is none, with a description."""
        found = self._client.get_experiment_by_name(name) or self._new_experiment(name)
        if found.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            do = f"Restore it with {restore}, or choose another with tracker.experiment=NAME."
            raise SparseExpError(f"The MLflow experiment {name} was deleted. {do}")
        if NOTE_TAG not in found.tags:  # somebody's own text, an empty one too, stays
            note = experiment_note(found.experiment_id)
            self._client.set_experiment_tag(found.experiment_id, NOTE_TAG, note)
        return str(found.experiment_id)

    def _new_experiment(self, name: str) -> Any:
        # A server places artifacts itself; for a database MLflow would take ./mlruns.
        remote = self._uri.startswith(("http:", "https:"))
        location = None if remote else (self._store / ARTIFACTS).as_uri()
        try:
            self._client.create_experiment(name, artifact_location=location)
        except Exception:  # another process may have been faster
            if found := self._client.get_experiment_by_name(name):
                return found
            raise
        return self._client.get_experiment_by_name(name)

    def _abandon(self) -> None:
        """Close a run that could not be started in full."""
        if self.run_id is not None:
            with suppress(Exception):
                self._client.set_terminated(self.run_id, "FAILED")
        self.run_id = None

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


class RunWriter:
    """Writes the events of one run.

    Args:
        client: MLflow's, of a store that has the run.
        run_id: of the run.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id

    def send(self, event: Any, milliseconds: int) -> None:
        """Write one event; to write it twice changes nothing.

        Args:
            event: see `sparse_exp.tracking.Event`.
            milliseconds: since 1970, when it happened.

        Raises:
            Exception: MLflow's, or of a file that cannot be read.
        """
        if isinstance(event, Metrics):
            self._send_metrics(event, milliseconds)
        elif isinstance(event, Tags):
            self._send_tags(event)
        elif isinstance(event, Dataset):
            self._client.log_inputs(self._run_id, datasets=[_dataset_input(event)])
        elif isinstance(event, Artifact):
            self._client.log_artifact(self._run_id, str(event.path), event.folder or None)
        elif isinstance(event, Model):
            _register(self._client, self._run_id, event)
        elif isinstance(event, Finish):
            _end(self._client, self._run_id, event, milliseconds)

    def _send_metrics(self, event: Metrics, milliseconds: int) -> None:
        from mlflow.entities import Metric

        finite = {key: float(value) for key, value in event.values.items() if math.isfinite(value)}
        if left_out := sorted(set(event.values) - set(finite)):
            _log.debug("Not tracked at step %s because they are not finite: %s", event.step, left_out)
        step = event.step or 0
        metrics = [Metric(sanitize(key), value, milliseconds, step) for key, value in finite.items()]
        for batch in _batches(metrics):
            self._client.log_batch(self._run_id, metrics=batch)

    def _send_tags(self, event: Tags) -> None:
        _set_tags(self._client, self._run_id, event.values)


def connect(uri: str) -> Any:
    """MLflow's client of a store that answers.

    Raises:
        MissingDependency: MLflow is not installed.
        Exception: the store does not answer.
    """
    client_class = import_client()
    with ready_database(uri):
        client = client_class(uri)
        client.search_experiments(max_results=1)
    return client


def close_dead(
    config: TrackerConfig,
    store: Path,
    parent: str | None,
    has_died: Callable[[FoundRun], bool],
    end: Finish,
) -> int:
    """Close runs that still say RUNNING and are dead; see `sparse_exp.tracking.end_open_runs`.

    Raises:
        MissingDependency: MLflow is not installed.
        Exception: the store does not answer.
    """
    client = connect(tracking_uri(config, store)[0])
    experiments = [found.experiment_id for found in client.search_experiments()]
    wanted = ["attributes.status = 'RUNNING'", *([f"tags.`{PARENT_TAG}` = '{parent}'"] if parent else [])]
    dead = [
        run.info.run_id
        for run in pages(client, experiments, " and ".join(wanted))
        if has_died(FoundRun(run.info.run_id, run.data.tags, run.data.metrics, run.info.run_name))
    ]
    for run_id in dead:
        _end(client, run_id, end, int(time.time() * 1000))
    return len(dead)


def pages(client: Any, experiments: Sequence[str], wanted: str, at_most: int | None = None) -> Iterator[Any]:
    """All runs that a search finds, newest first, page by page.

    Args:
        client: MLflow's.
        experiments: their ids; at least one.
        wanted: in MLflow's language of filters.
        at_most: so many; None: all.
    """
    token, left = None, at_most
    while experiments and (left is None or left > 0):
        size = _PER_PAGE if left is None else min(left, _PER_PAGE)
        page = client.search_runs(experiments, wanted, max_results=size, page_token=token)
        yield from page
        left = None if left is None else left - len(page)
        if not (token := page.token):
            return


def forget(config: TrackerConfig, store: Path, run_id: str) -> None:
    """Delete a run as MLflow does: it is out of all lists, and can be restored.

    Raises:
        MissingDependency: MLflow is not installed.
        Exception: the store does not answer, or has no such run.
    """
    connect(tracking_uri(config, store)[0]).delete_run(run_id)


def search(config: TrackerConfig, store: Path, tag: str, value: str) -> list[FoundRun]:
    """Finished runs of all experiments that carry a tag, newest first; see `sparse_exp.tracking.find_runs`.

    Raises:
        MissingDependency: MLflow is not installed.
        Exception: the store does not answer.
    """
    client_class, (uri, _) = import_client(), tracking_uri(config, store)
    with ready_database(uri):
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
    for name in ("system_metrics", "store.db.utils"):  # they only repeat what the tracker says
        logging.getLogger(f"mlflow.{name}").setLevel(logging.CRITICAL)
    _log.debug("Imported mlflow in %.1f s", time.monotonic() - started)
    return MlflowClient


def _why_not(client: Any, run_id: str, params: Mapping[str, str]) -> str | None:
    """Why a run of MLflow's cannot go on with some parameters, as a clause; None: it can."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return "this store does not have it"
    if found.info.lifecycle_stage != "active":
        return "it was deleted"
    then = found.data.params  # a key that only one of them has is of another version, and has its default
    changed = [
        key
        for key, value in params.items()
        if then.get(key, value) != value and key.partition(".")[0] not in _MAY_DIFFER
    ]
    more = f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
    return f"it has another {', '.join(changed[:_MOST_NAMED])}{more}" if changed else None


def _succeed(client: Any, former: str, run: Any) -> None:
    """Say on a former run which one takes its place, end it, and give its children to the new one.

    The new run may be in another experiment than its children.
    """
    run_id, experiments = run.info.run_id, [each.experiment_id for each in client.search_experiments()]
    with suppress(Exception):  # it was deleted, or is on another server
        client.set_tag(former, _CONTINUED_TAG, run_id)
        if client.get_run(former).info.status == "RUNNING":
            client.set_terminated(former, "KILLED")
    children = f"tags.`{PARENT_TAG}` = '{former}'"
    while found := client.search_runs(experiments, children, max_results=_PER_BATCH):
        for child in found:
            client.set_tag(child.info.run_id, PARENT_TAG, run_id)


def is_deleted(client: Any, run_id: str) -> bool:
    """Whether somebody has deleted a run in the store; False where that is not known."""
    with suppress(Exception):
        return bool(client.get_run(run_id).info.lifecycle_stage != "active")
    return False


def _reopen(client: Any, run_id: str) -> None:
    """Let a run that ended go on: it is RUNNING, and no longer failed."""
    client.update_run(run_id, status="RUNNING")
    _forget_failure(client, run_id)


def _forget_failure(client: Any, run_id: str) -> None:
    tags = client.get_run(run_id).data.tags
    if _FAILURE_TAG in tags:
        client.set_tag(run_id, NOTE_TAG, _without_failure(tags))
        client.delete_tag(run_id, _FAILURE_TAG)


def _end(client: Any, run_id: str, end: Finish, milliseconds: int) -> None:
    if end.reason:
        rest = _without_failure(client.get_run(run_id).data.tags)
        note = f"{end.status}: {end.reason}" + (f"\n\n{rest}" if rest else "")
        _set_tags(client, run_id, {_FAILURE_TAG: end.reason, NOTE_TAG: note})
    else:  # somebody may have taken it for dead meanwhile
        _forget_failure(client, run_id)
    client.set_terminated(run_id, end.status, end_time=milliseconds)


def _without_failure(tags: Mapping[str, str]) -> str:
    """The note of a run without the paragraph that says how it failed."""
    first, _, rest = tags.get(NOTE_TAG, "").partition("\n\n")
    failed = _FAILURE_TAG in tags and first.partition(": ")[0] in ("FAILED", "KILLED")
    return rest if failed else tags.get(NOTE_TAG, "")


def _set_tags(client: Any, run_id: str, values: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for batch in _batches([RunTag(key, value) for key, value in _clean_tags(values).items()]):
        client.log_batch(run_id, tags=batch)


def _register(client: Any, run_id: str, model: Model) -> None:
    """Make the file a version of the registered model, unless it is one of this run's already."""
    digest = hashlib.sha256(model.path.read_bytes()).hexdigest()
    versions = client.search_model_versions(f"name = '{model.name}' and run_id = '{run_id}'")
    version = next((found for found in versions if found.tags.get(_SHA256_TAG) == digest), None)
    if version is None:
        with tempfile.TemporaryDirectory() as folder:
            client.log_artifacts(run_id, str(_save_model(model, Path(folder))), _MODEL_FOLDER)
        _make_name(client, model.name)
        # Not runs:/..., which a client resolves against the store of its own process.
        source = f"{client.get_run(run_id).info.artifact_uri}/{_MODEL_FOLDER}"
        tags = _clean_tags({**model.tags, _SHA256_TAG: digest})
        version = client.create_model_version(model.name, source, run_id, tags)
    if model.alias:
        client.set_registered_model_alias(model.name, model.alias, version.version)
    _log.info("Registered as %s, version %s%s", model.name, version.version,
              f" ({model.alias})" if model.alias else "")  # fmt: skip


def _make_name(client: Any, name: str) -> None:
    try:
        client.create_registered_model(name)
    except Exception:  # it is there, perhaps from a process that was faster; or there is something wrong
        client.get_registered_model(name)


def _save_model(model: Model, folder: Path) -> Path:
    """A directory in MLflow's layout for ONNX models, with the very file in it."""
    import mlflow.onnx
    import onnx
    import onnxruntime
    from onnx.version import version as onnx_version

    graph, place = onnx.load(str(model.path)), folder / "model"
    mlflow.onnx.save_model(
        graph,
        str(place),
        signature=_signature(graph.graph),
        pip_requirements=[f"onnx=={onnx_version}", f"onnxruntime=={onnxruntime.__version__}"],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
    )
    shutil.copyfile(model.path, place / _MODEL_FILE)
    return place


def _signature(graph: Any) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import Schema

    return ModelSignature(
        inputs=Schema([_tensor_spec(value) for value in graph.input]),
        outputs=Schema([_tensor_spec(value) for value in graph.output]),
    )


def _tensor_spec(value: Any) -> Any:
    """Name, element type and shape of a graph's input or output; -1 stands for any length."""
    from mlflow.types import TensorSpec
    from onnx.helper import tensor_dtype_to_np_dtype

    tensor = value.type.tensor_type
    shape = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in tensor.shape.dim)
    return TensorSpec(tensor_dtype_to_np_dtype(tensor.elem_type), shape, value.name)


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
    publish, started = monitor.publish_metrics, time.monotonic()

    def publish_sparingly(metrics: Any) -> None:
        publish(metrics)
        monitor.sampling_interval = sampling_interval(time.monotonic() - started)

    monitor.publish_metrics = publish_sparingly
    monitor.start()
    return monitor


def sampling_interval(elapsed: float) -> float:
    """Seconds to the next sample of the host, longer the longer a run goes on: a week has 10,000 of them.

    Args:
        elapsed: seconds since the first.
    """
    return max(_SYSTEM_METRICS_EVERY_S, elapsed / _SYSTEM_METRICS_MOST)


def _clean_tags(tags: Any) -> dict[str, str]:
    return {sanitize(key): shorten(str(value), _MAX_TAG_LENGTH) for key, value in tags.items()}


def _batches(entities: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(entities), _PER_BATCH):
        yield entities[start : start + _PER_BATCH]
